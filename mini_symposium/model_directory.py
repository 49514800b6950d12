"""A directory with a model in it, looked at before anything is loaded from it; it may have come from anywhere."""

from pathlib import Path

from mini_symposium.errors import InputError
from mini_symposium.run import read_object
from mini_symposium.tensor_files import read_header

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
