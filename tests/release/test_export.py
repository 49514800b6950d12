"""What is exported is read by the program that it is for: llama.cpp itself, Axolotl's own schema."""

import json
import re
import resource
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml
from conftest import command
from safetensors.torch import load_file, save_file

from mini_symposium.data.dataset import load_examples
from mini_symposium.data.prompt_formats import FORMATS
from mini_symposium.errors import RunError
from mini_symposium.models.base_files import local_directory
from mini_symposium.models.catalog import download
from mini_symposium.models.merge import merge
from mini_symposium.recipe import load_recipe
from mini_symposium.release.chat_frontends import ollama_template
from mini_symposium.release.export import choose, gguf, ollama
from mini_symposium.release.gguf import ask
from mini_symposium.run import ROOT

AXOLOTL = "axolotl==0.19.0", "f28eb3ad3709975eec4adfe13307dd980c7e7917cc43cb03f2c6f26c007135cc"


@pytest.fixture(scope="module")
def exported(proxy_checkpoint, tmp_path_factory):
    """The proxy with its adapter merged, in full and at 8 bits, and a quantised base with the adapter beside it."""
    run, folder = proxy_checkpoint.parents[2], tmp_path_factory.mktemp("exported")
    said = command("export", "gguf", run, "--type", "f32", "--type", "q8_0", "--out", folder / "merged").stdout
    beside = command("export", "gguf", run, "--lora", "--type", "q4_K_M", "--out", folder / "lora").stdout
    return folder, said, beside


def proofs(folder):
    files = json.loads((folder / "export.json").read_text())["files"]
    return {entry["kind"]: entry["proof"] for entry in files.values() if "proof" in entry}


def test_llama_cpp_answers_from_the_gguf_as_transformers_does(exported):
    folder, said, _ = exported
    found = proofs(folder / "merged")
    assert found["f32"]["prompts"] == 2 * len(FORMATS)
    assert found["f32"]["same_answers"] == found["f32"]["prompts"]
    assert found["f32"]["worst"] < 0.01
    assert found["q8_0"]["behind"] < 0.1
    assert said.count("llama.cpp against transformers: tokens of 16 prompts equal") == 2


def test_llama_cpp_answers_with_the_adapter_beside_a_quantised_base(exported, proxy_checkpoint):
    folder, _, said = exported
    assert proofs(folder / "lora")["q4_K_M"]["behind"] < 0.1
    assert {path.suffixes[-2] for path in (folder / "lora").glob("*.gguf")} == {".lora", ".q4_K_M"}
    base, lora = (next((folder / "lora").glob(f"*.{kind}.gguf")) for kind in ("q4_K_M", "lora"))
    form = FORMATS["new-query"]
    prompts = [form.render(load_examples(ROOT / "data" / "minisymposium.md")[0].query)]
    with_it, without = (ask(base, prompts, [form.stop_strings()], 32, adapter)[0].text for adapter in (lora, None))
    assert with_it != without
    assert "Q8_0" in said or "Q5_0" in said


def test_a_file_that_answers_otherwise_is_not_exported(proxy_checkpoint, tmp_path, monkeypatch):
    """A converter that swaps two matrices makes a file that loads and speaks; the check must refuse it."""
    from mini_symposium.release import export as release

    broken = tmp_path / "broken"

    def swapped(model, target, outtype, name):
        shutil.copytree(model, broken)
        tensors = load_file(broken / "model.safetensors")
        one, other = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (3, 4))
        tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()
        save_file(tensors, broken / "model.safetensors", {"format": "pt"})
        write(broken, target, outtype, name)

    write, out = release.to_gguf, tmp_path / "out"
    monkeypatch.setattr(release, "to_gguf", swapped)
    # the reference would be read from the broken file itself, so it is given the whole one
    monkeypatch.setattr(
        "mini_symposium.release.gguf.read_gguf", lambda file, names: load_file(tmp_path / "m/model.safetensors")
    )
    merge(proxy_checkpoint, "SmolLM2-135M-Instruct", tmp_path / "m", "nf4")
    with pytest.raises(RunError, match=r"nats behind, 0\.01 are allowed"):
        gguf(choose(str(tmp_path / "m")), out, ["f16"])
    assert not out.exists()


def test_a_directory_is_exported_and_what_exists_is_left_alone(tiny_checkpoint, tmp_path):
    merge(tiny_checkpoint, "tiny", tmp_path / "model")
    made = gguf(choose(str(tmp_path / "model")), tmp_path / "out", ["f16"])
    assert list(made["files"]) == ["model.f16.gguf"]
    for line, said in (
        ((tmp_path / "model", "--out", tmp_path / "out"), "is there already"),
        ((tmp_path / "model", "--out", tmp_path / "b", "--type", "q3"), "--type q3: give some of f32"),
        ((tmp_path / "model", "--out", tmp_path / "b", "--lora"), "is not a single adapter"),
        (
            (tmp_path / "nowhere", "--out", tmp_path / "b"),
            "a run directory (recipe.yml) or a model directory (config.json)",
        ),
    ):
        done = command("export", "gguf", *line, check=False)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def limited(size):
    """The limit on a file's size makes a write fail halfway, as a full disk does."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_disk_that_fills_in_an_export_leaves_nothing_behind(tiny_checkpoint, tmp_path):
    run, out = tiny_checkpoint.parents[2], tmp_path / "out"
    line = ("export", "gguf", run, "--type", "f32", "--out", out)
    merged = 2 * (local_directory("tiny") / "model.safetensors").stat().st_size  # in float32; the GGUF is a little more
    for size, whose in ((merged // 2, "cannot be written (File too large)"), (merged + 10**5, "llama.cpp's converter")):
        done = command(*line, check=False, preexec_fn=limited(size))
        assert done.returncode == 2 and whose in done.stderr and "free some space" in done.stderr
        assert len(done.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_ollama_gets_a_model_and_its_modelfile(tiny_checkpoint, tmp_path):
    what = choose(str(tiny_checkpoint.parents[2]), ["epoch-6"])
    ollama(what, tmp_path / "out", FORMATS["character"], "q8_0", "Ines", "Brannoch", lora=True)
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert ollama_template(FORMATS["character"], "Ines", "Brannoch") in text
    model, adapter = re.findall(r"^(?:FROM|ADAPTER) \./(.*)$", text, re.M)
    assert model.endswith("-base.q8_0.gguf") and adapter.endswith(".lora.gguf")
    assert (tmp_path / "out" / model).is_file() and (tmp_path / "out" / adapter).is_file()


SCHEMA = """
import sys, yaml
sys.path.insert(0, sys.argv[1])
from axolotl.utils.schemas.config import AxolotlInputConfig
for path in sys.argv[2:]:
    try:
        found = AxolotlInputConfig.model_validate(yaml.safe_load(open(path)))
        print("read:", found.learning_rate, found.adapter, found.datasets[0].path, found.base_model)
    except ValueError:
        print("read: refused")
"""
"""Axolotl's own schema imports what is installed here anyway."""


def test_axolotls_schema_accepts_the_recipes(tmp_path):
    with zipfile.ZipFile(download(*AXOLOTL, tmp_path)) as archive:
        archive.extractall(tmp_path / "unpacked")
    paths, expected = [], []
    bases = {"proxy": "HuggingFaceTB/SmolLM2-135M-Instruct", "paper": "mistralai/Mistral-7B-v0.1"}
    for name, base in bases.items():
        command("export", "axolotl", name, "--out", tmp_path / name)
        recipe = load_recipe(name)
        rows = [json.loads(line)["text"] for line in (tmp_path / name / f"{name}.jsonl").read_text().splitlines()]
        assert rows == [example.text for example in load_examples(recipe.dataset)]
        paths.append(tmp_path / name / f"{name}.yml")
        expected.append(f"read: {recipe.learning_rate} qlora {name}.jsonl {base}")
    broken = tmp_path / "broken.yml"
    broken.write_text(yaml.safe_dump({**yaml.safe_load(paths[0].read_text()), "learning_rate": "fast"}))
    line = [sys.executable, "-c", SCHEMA, tmp_path / "unpacked", *paths, broken]
    done = subprocess.run(line, capture_output=True, text=True)
    found = [each for each in done.stdout.splitlines() if each.startswith("read:")]
    assert found == [*expected, "read: refused"], done.stderr
