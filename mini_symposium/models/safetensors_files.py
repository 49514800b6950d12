"""Safetensors read and written one tensor at a time, so that no more than one is ever held.

The format (huggingface/safetensors): eight bytes with the length of a JSON header, the header with each tensor's type,
shape and place, then the bytes without a gap. Since a place follows from the types and shapes, the header can be
written before the first tensor is known. Files are read, not mapped: mapped pages count as a process's memory.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mini_symposium.errors import InputError

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
LARGEST_HEADER = 100_000_000
"""Bytes; safetensors' own limit."""
NAMES = {dtype: name for name, dtype in TYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its type, its shape, and the bytes `start` to `end` of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """What is in a file, in the order in which it lies there.

    Raises
    ------
    InputError
        If the file is no safetensors, is cut off, or holds a type that is not known here.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("there is no such file")
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, LARGEST_HEADER):
                raise ValueError(f"its header should have {length} bytes")
            found = json.loads(file.read(length))
        found.pop("__metadata__", None)
        entries = {
            name: Entry(TYPES[each["dtype"]], tuple(each["shape"]), *(8 + length + at for at in each["data_offsets"]))
            for name, each in found.items()
        }
        for name, entry in entries.items():
            counts = (*entry.shape, entry.start, entry.end)
            if len(counts) > 18 or any(type(count) is not int or count < 0 for count in counts):
                raise ValueError(f"{name} has a shape or a place that is no count")
            if entry.end - entry.start != math.prod(entry.shape) * entry.dtype.itemsize:
                raise ValueError(f"{name} has another size than its shape")
    except KeyError as error:
        if error.args[0] in ("dtype", "shape", "data_offsets"):
            raise InputError(f"{path}: not a whole safetensors file (a tensor has no {error})") from error
        raise InputError(f"{path}: holds {error}, which is not read here; save it in 16 or 32 bits") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:  # not UTF-8, not JSON, not a mapping
        raise InputError(f"{path}: not a whole safetensors file ({error})") from error
    end = max((entry.end for entry in entries.values()), default=0)
    if end > size:
        raise InputError(f"{path}: cut off: {size} bytes of {end}; copy or download it again")
    at, ordered = 8 + length, sorted(entries.items(), key=lambda pair: (pair[1].start, pair[1].end))
    for name, entry in ordered:  # the same bytes for many names would be as many tensors
        if entry.start != at:
            raise InputError(f"{path}: not a whole safetensors file ({name} does not follow the tensor before it)")
        at = entry.end
    if at != size:
        raise InputError(f"{path}: not a whole safetensors file (its last {size - at} bytes belong to no tensor)")
    return dict(ordered)


def read_tensor(path: Path, entry: Entry) -> torch.Tensor:
    """One tensor of a file, in memory of its own."""
    if entry.start == entry.end:
        return torch.empty(entry.shape, dtype=entry.dtype)
    content = bytearray(entry.end - entry.start)
    with path.open("rb", buffering=0) as file:
        file.seek(entry.start)
        view = memoryview(content)
        while view:
            got = file.readinto(view[: 2**28])
            if not got:
                raise InputError(f"{path}: became shorter while it was read")
            view = view[got:]
    return torch.frombuffer(content, dtype=entry.dtype).reshape(entry.shape)


@dataclass(frozen=True)
class Tensors(Mapping):
    """Tensors by name, each made anew when it is asked for: a model's, while one of them is held."""

    names: tuple[str, ...]
    make: Callable[[str], torch.Tensor]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def read_model(folder: Path) -> Tensors:
    """All tensors of a model directory in float32."""
    shards = {path: read_header(path) for path in sorted(folder.glob("*.safetensors"))}
    places = {name: (path, entry) for path, each in shards.items() for name, entry in each.items()}
    return Tensors(tuple(places), lambda name: read_tensor(*places[name]).float())


def changed(tensors: Mapping[str, torch.Tensor], change: Callable[[str, torch.Tensor], torch.Tensor]) -> Tensors:
    """The tensors, each as `change` makes it of its name and itself."""
    return Tensors(tuple(tensors), lambda name: change(name, tensors[name]))


def plus(tensors: Mapping[str, torch.Tensor], factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Tensors:
    """The tensors with what adapters add to them."""

    def add(name: str, tensor: torch.Tensor) -> torch.Tensor:
        a, b = factors.get(name, (None, None))
        return tensor if a is None else tensor.addmm(b, a)

    return changed(tensors, add)


@torch.no_grad()
def take(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put `tensors` into a model in place of its own."""
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])


def read_names(folder: Path) -> list[str]:
    """Names of a model directory's tensors."""
    return [name for path in sorted(folder.glob("*.safetensors")) for name in read_header(path)]


def write_tensors(
    path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[torch.Tensor]
) -> None:
    """Write a safetensors file of `layout`; the tensors are asked for one by one, in its order."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in layout.items():
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        _write(file, len(text).to_bytes(8, "little") + text)
        for (name, (dtype, shape)), tensor in zip(layout.items(), tensors, strict=True):
            if (tensor.dtype, tuple(tensor.shape)) != (dtype, tuple(shape)):
                raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} where {dtype} {shape} was announced")
            _write(file, tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _write(file, content) -> None:
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]
