"""The ways of storing a model, and for each the model's tensors as they are read back."""

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch

from mini_symposium.errors import InputError, RunError
from mini_symposium.models.merge import nf4_round_trip, stochastic
from mini_symposium.models.safetensors_files import changed, read_header, read_model
from mini_symposium.release.gguf import (
    FILE_TYPES,
    INSTALL,
    QUANTISER,
    installed,
    quantise,
    read_gguf,
    tensor_types,
    to_gguf,
)

CASTS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STOCHASTIC = "bf16, stochastic"
STORAGES = (*CASTS, STOCHASTIC, *FILE_TYPES, "NF4")
"""From large to small: safetensors, GGUF by llama.cpp, and NF4 as made by loading in 4-bit."""


def available(storages: Sequence[str]) -> tuple[list[str], str]:
    """Those of `storages` that can be made here, and a line that says how to make the others; "" if all can."""
    unknown = [name for name in storages if name not in STORAGES]
    if unknown or not storages:
        raise InputError(f"storages {', '.join(unknown) or 'none'}: there are {', '.join(STORAGES)}")
    missing = [name for name in storages if name in FILE_TYPES and not installed(QUANTISER)]
    note = f"not measured: {', '.join(missing)}; `{INSTALL}` adds llama.cpp's quantiser" if missing else ""
    return [name for name in storages if name not in missing], note


def stored(
    models: Sequence[Path], linear: set[str], storages: Sequence[str], scratch: Path
) -> Iterator[tuple[str, list[Mapping[str, torch.Tensor]], dict[str, int]]]:
    """For each storage, the tensors of each model as they are read back from it, in float32.

    Parameters
    ----------
    models
        Directories of float32 safetensors.
    linear
        Names of the matrices that NF4 quantises; it leaves the others in bfloat16.
    scratch
        A folder for GGUF files: one in float32 for each model, and one for each model and quantised storage.

    Yields
    ------
    storage, tensors of each model, {GGUF type: number of matrices}
        The types are those of the last model's file, {} if it is not GGUF. If memory has room, the tensors are
        computed once, because dequantising takes longer than their use; otherwise they are computed at each access.

    Raises
    ------
    RunError
        If a float32 GGUF file does not give back exactly what was written: no quantised file could then be trusted.
    """
    round_trips = {name: lambda _, tensor, cast=cast: tensor.to(cast).float() for name, cast in CASTS.items()}
    round_trips |= {
        STOCHASTIC: lambda _, tensor: stochastic(tensor),
        "NF4": lambda name, tensor: _nf4(tensor, name in linear),
    }
    # The models in this storage, those in the previous one, which the caller still holds, and one to compare with.
    sizes = [_bytes(model) for model in models]
    keep = 2 * sum(sizes) + max(sizes) < psutil.virtual_memory().available
    with ThreadPoolExecutor(len(models)) as pool:  # the converter and the quantiser mostly use one thread each
        whole = [scratch / f"{number}.gguf" for number in range(len(models))]
        if set(storages) - set(round_trips):
            list(pool.map(_whole_gguf, models, whole))
        for storage in storages:
            if storage in round_trips:
                tensors, types = [changed(read_model(model), round_trips[storage]) for model in models], {}
            else:
                files = [file.with_stem(f"{storage}-{file.stem}") for file in whole]
                list(pool.map(quantise, whole, files, [storage] * len(models)))
                tensors = [read_gguf(file, list(read_model(model))) for model, file in zip(models, files, strict=True)]
                types = tensor_types(files[-1])
            yield storage, [dict(each) for each in tensors] if keep else tensors, types


def _bytes(folder: Path) -> int:
    """Bytes of a model directory's tensors in float32."""
    headers = [read_header(path) for path in folder.glob("*.safetensors")]
    return sum(4 * math.prod(entry.shape) for header in headers for entry in header.values())


def _whole_gguf(model: Path, file: Path) -> None:
    to_gguf(model, file, "f32")
    tensors = read_model(model)
    for name, tensor in read_gguf(file, tuple(tensors)).items():
        expected = tensors[name]
        if not (torch.equal(tensor, expected) or torch.equal(tensor, expected + 1 - 1)):  # Gemma's norms, see read_gguf
            raise RunError(f"{name}: a float32 GGUF file gives back other values; its layout there is not known")


def _nf4(tensor: torch.Tensor, quantised: bool) -> torch.Tensor:
    """A tensor as loading in 4-bit makes it: rounded to bfloat16, and then, if it is quantised, to NF4."""
    half = tensor.bfloat16()
    return (nf4_round_trip(half) if quantised else half).float()
