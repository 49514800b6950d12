"""What a storage makes of a model's weights, and which storages can be made here."""

import shutil

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from mini_symposium.errors import InputError, RunError
from mini_symposium.models.base_files import local_directory
from mini_symposium.models.safetensors_files import read_model
from mini_symposium.release import storage_formats
from mini_symposium.release.storage_formats import STORAGES, available, stored


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The tiny base in float32, with values that no format of 16 bits holds."""
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(local_directory("tiny"), folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v.float() * 1.001 for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("room", [0, 10**12])
def test_a_storage_gives_back_each_weight_as_it_rounds_it(model, room, tmp_path, monkeypatch):
    """Whether its tensors are kept in memory or computed whenever they are asked for."""
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=room))
    weights, linear = read_model(model), "model.layers.0.mlp.up_proj.weight"
    storages = ["fp32", "fp16", "bf16", "NF4"]
    found = {name: tensors for name, [tensors], _ in stored([model], {linear}, storages, tmp_path)}
    assert list(found) == storages and all(isinstance(each, dict) == bool(room) for each in found.values())
    for name, weight in weights.items():
        assert torch.equal(found["fp32"][name], weight)
        assert torch.equal(found["fp16"][name], weight.half().float())
        assert torch.equal(found["bf16"][name], weight.bfloat16().float())
        if name != linear:
            assert torch.equal(found["NF4"][name], weight.bfloat16().float())
    assert 0.01 < (found["NF4"][linear] - weights[linear]).norm() / weights[linear].norm() < 0.2
    blocks = found["NF4"][linear].reshape(-1, 64)
    assert all(len(block.unique()) <= 16 for block in blocks)


def test_a_converter_that_changes_a_weight_is_found_out(model, tmp_path, monkeypatch):
    """A file whose names are all there, with the layers of another order, is not measured as if it were the model."""
    swapped, convert = tmp_path / "swapped", storage_formats.to_gguf
    shutil.copytree(model, swapped)
    tensors = load_file(model / "model.safetensors")
    one, other = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
    tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()
    save_file(tensors, swapped / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(storage_formats, "to_gguf", lambda model, file, outtype: convert(swapped, file, outtype))
    with pytest.raises(
        RunError, match=r"layers\.[01]\.self_attn\.q_proj\.weight: a float32 GGUF file gives back other"
    ):
        next(stored([model], set(), ["q8_0"], tmp_path))


def test_without_the_quantiser_the_rest_is_measured_and_its_line_said(monkeypatch):
    monkeypatch.setattr("mini_symposium.release.storage_formats.installed", lambda *names: False)
    there, said = available(STORAGES)
    assert there == ["fp32", "fp16", "bf16", "bf16, stochastic", "NF4"]
    assert said.startswith("not measured: q8_0, q6_K, q5_K_M, q4_K_M") and "pip install -e '.[release]'" in said


def test_a_storage_that_there_is_not_is_refused():
    with pytest.raises(InputError, match="storages int3: there are fp32, fp16"):
        available(["fp32", "int3"])
    with pytest.raises(InputError, match="storages none: there are fp32"):
        available([])
