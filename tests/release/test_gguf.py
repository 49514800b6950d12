"""GGUF files: what is read back is what was written, and llama.cpp reads prompts and answers as transformers does."""

import re
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mini_symposium.data.prompt_formats import FORMATS
from mini_symposium.errors import InputError, RunError
from mini_symposium.models.base_files import local_directory
from mini_symposium.models.base_models import load_tokenizer
from mini_symposium.models.safetensors_files import read_model
from mini_symposium.release.gguf import (
    QUANTISER,
    SERVER,
    ask,
    converter,
    quantise,
    read_gguf,
    require,
    tensor_types,
    to_gguf,
)
from mini_symposium.run import ROOT


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Makes the f32 GGUF file of a base model, once."""
    folder = tmp_path_factory.mktemp("whole")

    def file(name):
        path = folder / f"{name}.gguf"
        if not path.exists():
            to_gguf(local_directory(name), path, "f32")
        return path

    return file


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_K_M"])
@pytest.mark.parametrize("name", ["tiny", "SmolLM2-135M-Instruct"])
def test_what_is_read_from_gguf_is_what_was_written(name, kind, whole, tmp_path):
    """In float32 to the bit; quantised, each weight within the step of its type, so that none is in another's place."""
    folder, file = local_directory(name), whole(name)
    if kind != "f32":
        quantise(file, tmp_path / "b.gguf", kind)
        file = tmp_path / "b.gguf"
    written, read = read_model(folder), read_gguf(file, list(read_model(folder)))
    assert written.keys() == read.keys()
    for key, tensor in written.items():
        if kind == "f32":
            assert torch.equal(read[key], tensor), key
        else:
            assert (read[key] - tensor).norm() < (0.02 if kind == "q8_0" else 0.15) * tensor.norm(), key
    assert sum(tensor_types(file).values()) == sum(tensor.ndim > 1 for tensor in written.values())


def test_prompts_have_the_same_tokens_as_in_training(whole):
    """What the check compares is not empty: the tokens of a format's prompt are those that transformers gives."""
    prompts = [form.render("Wie geht's, 你好?") for form in FORMATS.values()]
    replies = ask(whole("SmolLM2-135M-Instruct"), prompts, [[]] * len(prompts), 1)
    tokenizer = load_tokenizer("SmolLM2-135M-Instruct")
    assert [reply.prompt_ids for reply in replies] == tokenizer(prompts)["input_ids"]


def test_what_llama_cpp_cannot_read_is_an_error_in_a_line(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF and then nothing")
    with pytest.raises(RunError, match=r"llama\.cpp's server failed"):
        ask(tmp_path / "a.gguf", ["Hello"], [[]], 1)


def test_a_disk_that_fills_in_the_quantiser_is_said(whole, tmp_path):
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom mini_symposium.release.gguf import quantise\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
        "quantise(*map(Path, sys.argv[1:]), 'q8_0')"
    )
    line = [sys.executable, "-c", code, whole("tiny"), tmp_path / "q8.gguf"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert "InputError: llama.cpp's quantiser could not write the whole file: the disk is full" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_extra_is_pinned_and_named_when_missing():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["release"]
    assert {QUANTISER, SERVER} <= {re.split("==", line)[0] for line in extra}
    assert all("==" in line for line in extra)
    with pytest.raises(InputError, match=r"^no_such_package: not installed; `pip install -e '\.\[release\]'`"):
        require("no_such_package")


def test_two_threads_that_need_the_converter_on_a_fresh_cache_both_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MINI_SYMPOSIUM_CACHE", str(tmp_path))
    with ThreadPoolExecutor(2) as pool:
        both = [future.result() for future in (pool.submit(converter), pool.submit(converter))]
    assert both[0].is_file() and both[0] == both[1]
    assert list(tmp_path.glob("[!.]*")) == [both[0].parent]
