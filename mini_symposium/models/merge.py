"""Merge adapters into their base, in float32, and write a model that needs no PEFT.

At a very low learning rate the whole fine-tune changes weights of about 1e-2 by about 1e-5. bfloat16 keeps eight bits
and rounds most of such a change away. So the sum is taken in float32 and, by default, written in float32.

QLoRA trains against the *dequantised NF4* base. A merge onto the original weights is therefore a slightly different
model. Both can be made; `predictions.compare` measures each against base + adapter.

Everything is checked from the files' headers before anything is written. Then one tensor after another is read, changed
and written: a merge needs memory for the largest tensor, a few times over, not for the model.
"""

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from mini_symposium import __version__
from mini_symposium.errors import InputError, RunError, reason
from mini_symposium.files.reading import read_text
from mini_symposium.files.writing import check_new, check_room, clear_away, write_json, written_whole
from mini_symposium.models.adapters import Factors, check_trained_on, read_adapters
from mini_symposium.models.base_files import local_directory
from mini_symposium.models.devices import device, process_peak
from mini_symposium.models.safetensors_files import Header, read_header, read_tensor, weight_files, write_tensors
from mini_symposium.run import read_object

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BASES = ("original", "nf4")


def merge(
    checkpoint: Path | Mapping[Path, float],
    base_model: str,
    out: Path,
    base: str = "original",
    dtype: str = "float32",
    by_chance: bool = False,
) -> dict:
    """Write base + adapter into the folder `out`: safetensors, configuration and tokenizer.

    Parameters
    ----------
    checkpoint
        One adapter's folder, or {folder: weight} for several. The weights are those of the changes B A, not of A and B:
        the product of two means is not the mean of two products.
    base
        "original": the base's weights as they are stored. "nf4": as training saw them, quantised to NF4 and
        dequantised.
    dtype
        The type of written floating-point tensors: float32, float16 or bfloat16. The sum is always taken in float32.
    by_chance
        Round to bfloat16 up or down by chance, see `stochastic`. A change below half of bfloat16's step, which rounding
        to the nearest drops, is then kept on average, with more noise.

    Returns
    -------
    dict
        The content of `out`/merge.json: base_model, base, dtype, checkpoints, rounded, mini_symposium (its version).
        Besides that, memory: the process's peak in bytes, predicted and measured.

    Raises
    ------
    InputError
        If `out` exists, the base's tokenizer cannot be loaded, an adapter is damaged or does not fit the base, or the
        disk has no room. `out` is then unchanged.

    Examples
    --------
    >>> from mini_symposium import merge, open_run
    >>> [checkpoint] = open_run("runs/tiny").newest_checkpoints().values()  # doctest: +SKIP
    >>> merge(checkpoint, "tiny", Path("merged"), base="nf4")["checkpoints"]  # doctest: +SKIP
    [{'checkpoint': 'lr-1e-05/epoch-0003', 'weight': 1.0, 'scaling': 2.0, 'sha256': '5f0c...'}]
    """
    if base not in BASES or dtype not in DTYPES:
        raise InputError(f"base={base!r}, dtype={dtype!r}: base is one of {BASES}, dtype one of {tuple(DTYPES)}")
    if by_chance and dtype != "bfloat16":
        raise InputError(f"--by-chance, dtype={dtype!r}: only bfloat16 is rounded by chance")
    check_new(out)
    if clear_away(out.parent, out.name):
        raise InputError(f"{out}: another process is writing it; wait for it, or choose another folder")
    weights = checkpoint if isinstance(checkpoint, Mapping) else {checkpoint: 1.0}
    source = local_directory(base_model)
    factors, adapters = read_adapters(weights)
    shards = {path: read_header(path) for path in weight_files(source)}
    _check_fit(factors, shards, base_model, next(iter(weights)))
    check_trained_on(weights, base_model, source)
    written = {
        path: {name: each.to(DTYPES[dtype]) if each.is_floating_point() else each for name, each in header.items()}
        for path, header in shards.items()
    }
    size = sum(tensor.nbytes for header in written.values() for tensor in header.values())
    check_room(out, size)
    held = psutil.Process().memory_info().rss
    with suppress(OSError):  # on Linux, forget the peak of what the process, or its parent, did before
        Path("/proc/self/clear_refs").write_text("5")
    with written_whole(out) as temporary:
        temporary.mkdir()
        for path, header in written.items():
            tensors = (_merged(path, name, factors, base) for name in header)
            if by_chance:
                tensors = (stochastic(tensor) if tensor.is_floating_point() else tensor for tensor in tensors)
            cast = (tensor.to(header[name].dtype) for name, tensor in zip(header, tensors, strict=True))
            write_tensors(temporary / path.name, header, cast)
        for path in source.iterdir():
            if path.is_file() and path.name != "merge.json" and (path.suffix in TEXTS or NAMED.match(path.name)):
                _check_inside(path, source)
                shutil.copyfile(path, temporary / path.name)
        for index in temporary.glob("*.safetensors.index.json"):
            content = json.loads(index.read_text(encoding="utf-8"))
            write_json(index, {**content, "metadata": {**content.get("metadata", {}), "total_size": size}})
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        write_json(temporary / "config.json", {**config, "dtype": dtype})
        provenance = {"base_model": base_model, "base": base, "dtype": dtype, "checkpoints": adapters}
        provenance["rounded"] = "by chance" if by_chance else "to nearest"
        provenance["mini_symposium"] = __version__
        write_json(temporary / "merge.json", provenance)
        predicted, measured = held + predicted_bytes(shards, factors, base, dtype), process_peak()
        if any(path.name.startswith(("tokenizer", "vocab")) for path in source.iterdir()):
            _check_tokenizer(temporary, source)
    return {**provenance, "memory": {"predicted": predicted, "measured": measured}}


TEXTS, NAMED = (".json", ".jinja", ".model", ".txt"), re.compile(r"tokenizer|vocab|licen[cs]e|notice|.*terms", re.I)
"""Files of a base that go into its merge: configuration, tokenizer, chat template, the terms that it comes under."""
SPOKEN = (
    "### New Query\nWhy is 12 × 3 = 36?\n\n### Answer\nВот так. 因为如此。 🙂</s><|im_end|>\n\tdef f(x):  return x\n"
)


def _check_tokenizer(merged: Path, source: Path) -> None:
    """Load the merge's tokenizer, and refuse the merge if its token ids or its chat template are not the base's."""
    from transformers import AutoTokenizer  # takes seconds

    try:
        ours, theirs = (AutoTokenizer.from_pretrained(each, trust_remote_code=False) for each in (merged, source))
    except Exception as error:  # tokenizers raises bare exceptions
        raise InputError(f"{source}: its tokenizer cannot be loaded ({reason(error)})") from error
    if ours(SPOKEN).input_ids != theirs(SPOKEN).input_ids or ours.chat_template != theirs.chat_template:
        raise RunError(f"{merged}: its tokenizer gives other tokens than that of {source}; a file was not copied")


def chat_template(folder: Path) -> str:
    """The chat template of a tokenizer's folder, which older versions of transformers keep in its configuration."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja").strip()
    file = folder / "tokenizer_config.json"
    return str(read_object(file).get("chat_template") or "").strip() if file.is_file() else ""


def _check_inside(path: Path, source: Path) -> None:
    """Refuse links out of the base's folder, for the merge may be published; links to the hub's blobs are fine."""
    real, folder = path.resolve(), source.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if not real.is_relative_to(folder) and real.parent != blobs:
        raise InputError(f"{path}: leads out of {source}; delete the link, or put the file itself there")


def _merged(path: Path, name: str, factors: Factors, base: str) -> torch.Tensor:
    """A tensor of the base plus what the adapters add to it, in float32; if they add nothing, in the base's type."""
    weight = read_tensor(path, name)
    if base == "nf4" and weight.is_floating_point():
        weight = weight.bfloat16()  # training loads the base in bfloat16, whatever it is stored in
    if name not in factors:
        return weight
    if base == "nf4":
        weight = nf4_round_trip(weight)
    a, b = factors[name]
    return weight.float().addmm_(b, a)


def nf4_round_trip(weight: torch.Tensor) -> torch.Tensor:
    """A bfloat16 matrix as training in 4-bit sees it: quantised to NF4 with double quantisation (Dettmers et al. 2023,
    QLoRA, section 3) and dequantised again, in bfloat16 on the CPU. Loading in 4-bit makes the same calls."""
    packed, state = quantize_4bit(weight.to(device()), quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(packed, state).cpu()


def stochastic(tensor: torch.Tensor) -> torch.Tensor:
    """Stochastic rounding to bfloat16, as float32: a number becomes one of its two neighbours, the nearer with the
    higher probability, so that its expected value stays the same.

    The random numbers depend on the shape alone: two models are rounded alike where they are equal.
    """
    noise = torch.randint(0, 2**16, tensor.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    return ((tensor.float().view(torch.int32) + noise) & -(2**16)).view(torch.float32)


QUANTISING = 24
"""An upper bound on the bytes that bitsandbytes takes for an element as it quantises on a CPU: bfloat16, three times
float32, int32, and the packed result."""


def predicted_bytes(shards: Mapping[Path, Header], factors: Factors, base: str, dtype: str) -> int:
    """Bytes that merging adds to the process's memory: the largest tensor as it is read, changed and written."""

    def takes(name: str, tensor: torch.Tensor) -> int:
        work = QUANTISING if base == "nf4" and name in factors else 4
        return tensor.numel() * (tensor.itemsize + work + DTYPES[dtype].itemsize)

    return max(takes(name, tensor) for header in shards.values() for name, tensor in header.items())


def _check_fit(factors: Factors, shards: Mapping[Path, Header], base_model: str, where: Path) -> None:
    """Refuse adapters that change a layer that the base does not have, or has in another shape."""
    header = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    missing = [name for name in factors if name not in header]
    for name in factors.keys() & header.keys():
        (a, b), shape = factors[name], tuple(header[name].shape)
        if (b.shape[0], a.shape[1]) != shape:
            adapted = f"the adapter is for {b.shape[0]} x {a.shape[1]}"
            raise InputError(f"{where}: {name}: {adapted}, but {base_model} has {shape}; another base?")
    if missing:
        raise InputError(f"{where}: {len(missing)} of its layers are not in {base_model}; another base?")
