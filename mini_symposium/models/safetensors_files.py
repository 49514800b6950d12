"""Safetensors files read and written one tensor at a time, so that no more than one tensor is in memory.

The safetensors library reads them. It maps a file into memory, and pages that were read count as the process's memory
until the file is closed; so the file is opened anew for each tensor. The library's writer takes all tensors of a file
at once; so files are written here. A file has eight bytes with the length of a JSON header, the header with each
tensor's type, shape and offsets, and then the tensors' bytes without gaps. Offsets follow from types and shapes, so the
header is written before the first tensor is known.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mini_symposium.errors import InputError, reason

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types that are read, by their names in a header. Not float8: it needs scales, which a merge would not apply."""
NAMES = {dtype: name for name, dtype in TYPES.items()}

Header = dict[str, torch.Tensor]
"""{name: a tensor of the same type and shape on the meta device}, in the order in which the tensors lie in a file."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that are the model: those of its index, or model.safetensors, or else all.

    Some folders hold the same weights once more, as consolidated.safetensors.
    """
    files = sorted(folder.glob("*.safetensors"))
    indices = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.safetensors.index.json")]
    named = {name for index in indices for name in index["weight_map"].values()} or {"model.safetensors"}
    return [path for path in files if path.name in named] or files


def read_header(path: Path) -> Header:
    """The names, types and shapes of a file's tensors.

    Raises
    ------
    InputError
        If the file is not safetensors, is cut off, or holds a type that is not in TYPES.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for somebody to write into it
            raise FileNotFoundError("there is no such file")
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            return {
                name: torch.empty(part.get_shape(), dtype=TYPES[part.get_dtype()], device="meta")
                for name, part in slices.items()
            }
    except KeyError as error:
        raise InputError(f"{path}: holds {error}, which is not read here; save it in 16 or 32 bits") from error
    except (OSError, SafetensorError, TypeError, RuntimeError) as error:  # RuntimeError: a shape too large
        raise InputError(
            f"{path}: not a whole safetensors file ({reason(error)}); copy or download it again"
        ) from error


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor of a file. Its bytes are in memory only while it is in use."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


@dataclass(frozen=True)
class Tensors(Mapping):
    """A model's tensors by name, each computed anew at every access, so that only those in use are in memory."""

    names: tuple[str, ...]
    make: Callable[[str], torch.Tensor]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def read_model(folder: Path) -> Tensors:
    """All tensors of a model directory, in float32."""
    files = {name: path for path in weight_files(folder) for name in read_header(path)}
    return Tensors(tuple(files), lambda name: read_tensor(files[name], name).float())


def changed(tensors: Mapping[str, torch.Tensor], change: Callable[[str, torch.Tensor], torch.Tensor]) -> Tensors:
    """The tensors after `change`, which is called with a name and its tensor."""
    return Tensors(tuple(tensors), lambda name: change(name, tensors[name]))


def plus(tensors: Mapping[str, torch.Tensor], factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Tensors:
    """The tensors plus what adapters add to them; `factors` as `adapters.read_adapters` gives them."""

    def add(name: str, tensor: torch.Tensor) -> torch.Tensor:
        a, b = factors.get(name, (None, None))
        return tensor if a is None else tensor.addmm(b, a)

    return changed(tensors, add)


@torch.no_grad()
def take(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy `tensors` into the parameters of `model`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])


def write_tensors(path: Path, header: Header, tensors: Iterable[torch.Tensor]) -> None:
    """Write a safetensors file. The tensors are taken one by one, in the order of `header`.

    Raises
    ------
    ValueError
        If a tensor has another type or shape than in `header`.
    """
    entries, start = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in header.items():
        end = start + tensor.nbytes
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, expected), tensor in zip(header.items(), tensors, strict=True):
            if (tensor.dtype, tensor.shape) != (expected.dtype, expected.shape):
                raise ValueError(
                    f"{name}: {tensor.dtype} {tuple(tensor.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
                )
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
