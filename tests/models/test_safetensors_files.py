"""Files are read as safetensors reads them, and what is written here safetensors reads; one tensor at a time."""

import os
import weakref

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mini_symposium.errors import InputError
from mini_symposium.models.safetensors_files import (
    TYPES,
    Tensors,
    changed,
    plus,
    read_header,
    read_model,
    read_tensor,
    take,
    write_tensors,
)

GENERATOR = torch.Generator().manual_seed(0)
SHAPES = {"matrix": (3, 5), "vector": (7,), "scalar": (), "empty": (0, 4)}


def tensors():
    """One of each type and shape."""
    return {
        f"{name}.{dtype}": torch.randint(0, 2, shape, generator=GENERATOR).to(dtype)
        for name, shape in SHAPES.items()
        for dtype in TYPES.values()
    }


def meta(named):
    return {name: tensor.to("meta") for name, tensor in named.items()}


def test_what_safetensors_wrote_is_read(tmp_path):
    written = tensors()
    save_file(written, tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    assert header.keys() == written.keys()
    for name, tensor in header.items():
        assert tensor.is_meta and (tensor.dtype, tensor.shape) == (written[name].dtype, written[name].shape)
        assert torch.equal(read_tensor(tmp_path / "a.safetensors", name), written[name])


def test_what_is_written_safetensors_reads(tmp_path):
    written = tensors()
    write_tensors(tmp_path / "a.safetensors", meta(written), written.values())
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == written.keys() and all(torch.equal(read[name], written[name]) for name in read)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # without it, transformers does not load the file
    assert list(read_header(tmp_path / "a.safetensors"))[:3] == list(written)[:3]


def test_a_transposed_tensor_is_written_in_its_own_order(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3).T
    write_tensors(tmp_path / "a.safetensors", {"a": tensor.to("meta")}, [tensor])
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("wrong", [[torch.ones(3)], [torch.ones(2).half()], [], [torch.ones(2)] * 2])
def test_tensors_other_than_announced_are_not_written(tmp_path, wrong):
    with pytest.raises(ValueError):
        write_tensors(tmp_path / "a.safetensors", {"a": torch.empty(2, device="meta")}, wrong)


def test_tensors_are_asked_for_one_by_one_and_leave_memory_again(tmp_path):
    path, header = tmp_path / "a.safetensors", {f"t{number}": torch.empty(2**16, device="meta") for number in range(8)}
    alive = weakref.WeakSet()

    def made():
        for number in range(8):
            alive.add(tensor := torch.full((2**16,), float(number)))
            yield tensor
            del tensor
            assert len(alive) == 1  # the writer holds the last one until it has the next

    write_tensors(path, header, made())
    assert not alive
    for number, name in enumerate(read_header(path)):
        tensor = read_tensor(path, name)
        assert tensor[0] == number and any(each.path == str(path) for each in psutil.Process().memory_maps())
        del tensor
        assert not any(each.path == str(path) for each in psutil.Process().memory_maps())


def test_what_is_no_whole_file_is_named_with_what_to_do(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(9)}, path)
    whole = path.read_bytes()
    for content in (whole[:-4], whole + b"\0", b"", b"cos\nsystem\n"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.safetensors: not a whole safetensors file .*; copy or download it"):
            read_header(path)
    path.unlink()
    with pytest.raises(InputError, match=r"a\.safetensors: not a whole safetensors file \(there is no such file\)"):
        read_header(path)
    os.mkfifo(path)
    with pytest.raises(InputError, match="there is no such file"):
        read_header(path)
    save_file({"a": torch.ones(9).to(torch.float8_e4m3fn)}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"b\.safetensors: holds 'F8_E4M3', which is not read here; save it in 16"):
        read_header(tmp_path / "b.safetensors")


def test_a_model_is_read_from_all_its_files_in_float32_and_each_time_anew(tmp_path):
    save_file({"a": torch.ones(2).bfloat16()}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.tensor([1, 2])}, tmp_path / "model-2.safetensors")
    model = read_model(tmp_path)
    assert {name: tensor.tolist() for name, tensor in model.items()} == {"a": [1, 1], "b": [1, 2]}
    assert all(tensor.dtype == torch.float32 for tensor in model.values())
    assert model["b"].zero_() is not None and model["b"].tolist() == [1, 2]  # the file is as it was


def test_tensors_are_changed_added_to_and_taken_by_a_model():
    layer = torch.nn.Linear(2, 3, bias=False)
    base, (a, b) = layer.weight.detach().clone(), (torch.ones(1, 2), torch.tensor([[1.0], [2.0], [3.0]]))
    tensors = Tensors(("weight",), lambda name: base)
    added = plus(tensors, {"weight": (a, b)})
    assert torch.equal(added["weight"], base + torch.tensor([[1.0, 1], [2, 2], [3, 3]]))
    assert torch.equal(plus(tensors, {})["weight"], base) and len(added) == 1 and "weight" in added
    doubled = changed(added, lambda name, tensor: 2 * tensor if name == "weight" else tensor)
    take(layer, doubled)
    assert torch.equal(layer.weight, 2 * added["weight"])
    with pytest.raises(KeyError):
        take(torch.nn.Linear(2, 3), {"weight": base})
