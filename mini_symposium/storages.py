"""The ways in which a model is stored, and what each makes of its weights: a file's tensors as they are read back."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from transformers import PreTrainedModel

from mini_symposium import InputError, RunError
from mini_symposium.base_models import device
from mini_symposium.gguf_files import read_gguf, tensor_types
from mini_symposium.llama_cpp import FILE_TYPES, INSTALL, QUANTISER, installed, quantise, to_gguf
from mini_symposium.tensor_files import read_header, read_tensor

Tensors = dict[str, torch.Tensor]

CASTS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STOCHASTIC = "bf16, stochastic"
STORAGES = (*CASTS, STOCHASTIC, *FILE_TYPES, "NF4")
"""In order of size: as safetensors, as GGUF through llama.cpp, and as loading in 4-bit makes of them."""


def possible(storages: Sequence[str]) -> tuple[list[str], str]:
    """Those of `storages` that can be made here, and a line that says how to make the others; "" if there are none.

    Raises
    ------
    InputError
        If there is no such storage.
    """
    unknown = [name for name in storages if name not in STORAGES]
    if unknown or not storages:
        raise InputError(f"storages {', '.join(unknown) or 'none'}: there are {', '.join(STORAGES)}")
    missing = [name for name in storages if name in FILE_TYPES and not installed(QUANTISER)]
    said = f"not measured: {', '.join(missing)}; `{INSTALL}` adds llama.cpp's quantiser" if missing else ""
    return [name for name in storages if name not in missing], said


def read_model(folder: Path) -> Tensors:
    """All tensors of a model directory in float32."""
    shards = {path: read_header(path) for path in sorted(folder.glob("*.safetensors"))}
    return {name: read_tensor(path, entry).float() for path, each in shards.items() for name, entry in each.items()}


def stored(
    models: Sequence[Path], linear: set[str], storages: Sequence[str], scratch: Path
) -> Iterator[tuple[str, list[Tensors], dict[str, int]]]:
    """For each storage the tensors of each float32 model as its file would give them back, in float32.

    Parameters
    ----------
    models
        Directories of float32 safetensors.
    linear
        Names of the matrices that NF4 quantises; it leaves the others in bfloat16.
    scratch
        A folder for GGUF files: one in float32 for each model, and one at a time of the quantised.

    Yields
    ------
    name, tensors of each model, and how many matrices are in which GGUF type ({} if it is no GGUF)

    Raises
    ------
    RunError
        If a float32 GGUF file does not give back exactly what was written, so that nothing after it could be trusted.
    """
    for storage in storages:
        if storage in CASTS:
            cast = CASTS[storage]
            yield storage, [{k: t.to(cast).float() for k, t in read_model(model).items()} for model in models], {}
        elif storage == STOCHASTIC:
            yield storage, [{k: stochastic(t) for k, t in read_model(model).items()} for model in models], {}
        elif storage == "NF4":
            yield storage, [{k: _nf4(t, k in linear) for k, t in read_model(model).items()} for model in models], {}
        else:
            file, tensors = scratch / f"{storage}.gguf", []
            for number, model in enumerate(models):
                quantise(_whole_gguf(model, scratch / f"{number}.gguf"), file, storage)
                tensors.append(read_gguf(file, list(read_names(model))))
            yield storage, tensors, tensor_types(file)
            file.unlink()


def stochastic(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded to bfloat16 up or down by chance, in proportion to how near each is, so that the mean is kept.

    The chances are the same for each tensor of a shape: two models are rounded alike where they are alike.
    """
    dice = torch.randint(0, 2**16, tensor.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    return ((tensor.float().view(torch.int32) + dice) & -(2**16)).view(torch.float32)


@torch.no_grad()
def take(model: PreTrainedModel, tensors: Tensors) -> None:
    """Put `tensors` into a model in place of its own."""
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])


def read_names(folder: Path) -> list[str]:
    """Names of a model directory's tensors."""
    return [name for path in sorted(folder.glob("*.safetensors")) for name in read_header(path)]


def _whole_gguf(model: Path, file: Path) -> Path:
    if not file.exists():
        to_gguf(model, file, "f32")
        tensors = read_model(model)
        for name, tensor in read_gguf(file, list(tensors)).items():
            if not torch.equal(tensor, tensors[name]):
                raise RunError(
                    f"{name}: comes back from a float32 GGUF as something else; its layout is not known here"
                )
    return file


def _nf4(tensor: torch.Tensor, quantised: bool) -> torch.Tensor:
    """What loading in 4-bit makes of a tensor: bfloat16 first, then blocks of 64 in NF4; see `base_models.nf4`."""
    half = tensor.bfloat16()
    if not quantised:
        return half.float()
    packed, state = quantize_4bit(half.to(device()), quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(packed, state).float().cpu()
