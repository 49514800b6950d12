"""Adapters: finding a checkpoint by its name, reading what adapters add to a base, and loading a base with adapters.

transformers and PEFT take seconds to import, so only functions that load a model import them. A merge needs neither.
"""

import hashlib
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mini_symposium.errors import InputError, reason
from mini_symposium.models.base_files import local_directory
from mini_symposium.models.catalog import find_model
from mini_symposium.models.devices import device, memory
from mini_symposium.models.safetensors_files import weight_files
from mini_symposium.run import Resolved, RunDirectory, find, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""{weight name in the base: (A (R, in), B (out, R))}; B A is added to the weight."""


def read_adapters(weights: Mapping[Path, float]) -> tuple[Factors, list[dict]]:
    """Read the sum of what adapters add to a base's weights.

    Parameters
    ----------
    weights
        {checkpoint: its weight in the sum}.

    Returns
    -------
    factors
        {weight name in the base: (A (R, in), B (out, R))} in float32. R is the sum of the adapters' ranks; B is scaled
        by weight x lora_alpha / r, so that B A is the whole change.
    provenance
        For each adapter: checkpoint, weight, scaling (lora_alpha / r, in rsLoRA lora_alpha / sqrt(r)), and its file's
        sha256.

    Raises
    ------
    InputError
        If a checkpoint is incomplete, is a pickle, is not plain LoRA, or holds a number that is not finite.
    """
    parts, provenance = {}, []
    for checkpoint, weight in weights.items():
        config, tensors = _read(checkpoint)
        pairs = {name for name in tensors if name.endswith((".lora_A.weight", ".lora_B.weight"))}
        lone = {name for name in pairs if name.replace("lora_B", "lora_A") not in pairs}
        copies = {name for name in tensors if name.endswith(".base_layer.weight")}  # of the base's own head
        if others := sorted(tensors.keys() - pairs - copies | lone):
            beside = f"holds {', '.join(others[:3])} beside pairs of lora_A and lora_B"
            raise InputError(f"{checkpoint}: {beside}; only plain LoRA can be merged here, merge it with PEFT")
        if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise InputError(f"{checkpoint}: {broken[0]} holds NaN or infinity; take an earlier checkpoint")
        alpha, r = config.get("lora_alpha"), config.get("r")
        if not all(isinstance(n, int | float) and n > 0 for n in (alpha, r)):
            raise InputError(f"{checkpoint}: lora_alpha is {alpha!r} and r is {r!r}; both must be above 0")
        scaling = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        for name, a in tensors.items():
            if not name.endswith(".lora_A.weight"):
                continue
            target = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            b = tensors.get(name.replace("lora_A", "lora_B"))
            if b is None or a.ndim != 2 or b.shape[1:] != a.shape[:1]:
                raise InputError(f"{checkpoint}: not a whole adapter ({target}: lora_B is missing or of another rank)")
            parts.setdefault(target, []).append((a.float(), weight * scaling * b.float()))
        digest = hashlib.sha256((checkpoint / "adapter_model.safetensors").read_bytes()).hexdigest()
        name = "/".join(part for part in checkpoint.parts[-3:] if part != "checkpoints")
        provenance.append({"checkpoint": name, "weight": weight, "scaling": scaling, "sha256": digest})
    if not parts:
        raise InputError(f"{', '.join(map(str, weights))}: holds no lora_A, so there is nothing to merge")
    factors = {
        name: (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1))
        for name, pairs in parts.items()
    }
    return factors, provenance


NOT_PLAIN = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "modules_to_save"),
    *("rank_pattern", "alpha_pattern", "layer_replication", "target_parameters", "trainable_token_indices"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
)
"""Settings in adapter_config.json (PEFT 0.21) with which an adapter adds something else than B A x lora_alpha / r."""
APART = ("lora_bias", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern")
"""Of these, the settings with which PEFT can still switch the adapter off for single rows of a batch."""
ON_THE_BASE = ("gaussian", "eva", "orthogonal")
"""Initialisations that leave the base as it is, which PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do not."""


def _kind(config: dict, allowed: Sequence[str] = ()) -> str:
    """Why an adapter is not plain LoRA, as "LORA with use_dora"; "" if it is, or has only the `allowed` settings."""
    extras = [key for key in NOT_PLAIN if config.get(key) and key not in allowed]
    extras += ["bias"] * (config.get("bias", "none") != "none")
    start = config.get("init_lora_weights")
    extras += [f"init_lora_weights {start}"] * (isinstance(start, str) and start not in ON_THE_BASE)
    if config.get("peft_type") == "LORA" and not extras:
        return ""
    return " with ".join([str(config.get("peft_type")), *[", ".join(extras)] * bool(extras)])


def _read(checkpoint: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    weights = checkpoint / "adapter_model.safetensors"
    if checkpoint.parent.name.startswith("."):
        raise InputError(f"{checkpoint}: is still being written; wait until it is renamed")
    if not weights.exists() and (pickles := [path.name for path in checkpoint.glob("*.bin")]):
        raise InputError(f"{checkpoint}: holds {', '.join(pickles)}, a pickle; only safetensors are read, convert it")
    try:
        config = _config(checkpoint)
        tensors = load_file(weights)
    except (InputError, OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{checkpoint}: not a whole adapter ({error})") from error
    if kind := _kind(config):
        raise InputError(f"{checkpoint}: is {kind}; only plain LoRA can be merged here, merge it with PEFT")
    return config, tensors


def _config(checkpoint: Path) -> dict:
    """The checkpoint's adapter_config.json, read without PEFT, which would import transformers."""
    return read_object(checkpoint / "adapter_config.json")


def check_trained_on(weights: Mapping[Path, float], base_model: str, folder: Path) -> None:
    """Refuse adapters that name another base: merged into a base of the same shape, they would silently give nonsense.

    PEFT notes the folder or hub id that the base was loaded from. The folder may have been on another machine, so only
    names are compared.

    Parameters
    ----------
    base_model, folder
        The base's name, and the directory with its files.
    """
    names = {base_model, Path(base_model).name, folder.name, f"models--{base_model.replace('/', '--')}"}
    for checkpoint in weights:
        trained_on = str(_config(checkpoint).get("base_model_name_or_path") or "")
        if trained_on and not names & {trained_on, *Path(trained_on).parts}:
            raise InputError(
                f"{checkpoint}: was trained on {trained_on}, not on {base_model}; if that is the same model, "
                "correct base_model_name_or_path in its adapter_config.json"
            )


def with_base(resolved: Resolved, given: str = "") -> Resolved:
    """An adapter that no run trained, with its base: `given`, or what its adapter_config.json names.

    Anything else than such an adapter is returned unchanged.

    Raises
    ------
    InputError
        If the adapter is not in safetensors, or its base is not here and `given` is empty.
    """
    if resolved.kind != "adapter":
        return resolved
    adapter = resolved.path
    if not (adapter / "adapter_model.safetensors").is_file():
        raise InputError(f"{adapter}: no adapter_model.safetensors in it; only safetensors are read, convert it first")
    with (adapter / "adapter_model.safetensors").open("rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise InputError(
                f"{adapter}: its adapter_model.safetensors only names the file; fetch it by `git lfs pull`"
            )
    base = given or str(_config(adapter).get("base_model_name_or_path") or "")
    on_the_hub = base.count("/") == 1 and not base.startswith((".", "/", "~"))
    if not base or not (find(base).is_dir() or on_the_hub or find_model(base) or base == "tiny"):
        raise InputError(f"{adapter}: its base, {base or 'which it does not name'}, is not here; give --base-model")
    return replace(resolved, base=base)


def find_checkpoint(run: RunDirectory, name: str = "", learning_rate: float = 0.0) -> Path:
    """The checkpoint that `epoch-30`, `30` or `1e-05/epoch-30` names.

    Without an epoch it is the one that the run's held-out curve recommends, or without a curve the last; without a rate
    in `name`, the rate is `learning_rate`, or if that is 0, the lowest.

    Raises
    ------
    InputError
        If the run has no such checkpoint; says which there are.
    """
    rates = run.learning_rates()
    if not rates:
        raise InputError(
            f"{run.path}: nothing has been trained here; run `mini-symposium train --run {run.path}` first"
        )
    match = re.fullmatch(r"(?:(?:lr-)?(?P<rate>[^/]+)/)?(?:epoch-)?(?P<epoch>[0-9]{1,9})?", name)
    try:
        rate = float(match["rate"] or learning_rate or min(rates))
    except (TypeError, ValueError) as error:  # no match, or not a number
        raise InputError(f"--checkpoint {name[:99]}: takes epoch-N, or RATE/epoch-N") from error
    checkpoints = run.checkpoints(rate) if 0 < rate < math.inf else {}
    if not checkpoints:
        trained = ", ".join(f"{each:g}" for each in rates)
        raise InputError(f"{run.path}: no checkpoint at learning rate {rate:g}; there are rates {trained}")
    epoch = int(match["epoch"]) if match["epoch"] else run.recommended(rate) or max(checkpoints)
    if epoch not in checkpoints:
        folder = run.learning_rate_dir(rate) / "checkpoints"
        if any(folder.glob(f".epoch-{epoch:04d}.*")):
            raise InputError(f"{folder}: epoch-{epoch} is still being written; wait for it")
        there = ", ".join(f"epoch-{each}" for each in checkpoints)
        raise InputError(f"{folder}: epoch-{epoch} is not there, but {there}")
    return checkpoints[epoch]


def find_checkpoints(run: RunDirectory, names: Sequence[str] = (), learning_rate: float = 0.0) -> dict[Path, float]:
    """{checkpoint: weight} of names such as `epoch-12=0.3`. Without weights, each of N gets 1 / N.

    Parameters
    ----------
    names, learning_rate
        As in `find_checkpoint`; without names, its default checkpoint.

    Raises
    ------
    InputError
        If a checkpoint is not there or is given twice, or only some have a weight.
    """
    pairs = [name.partition("=") for name in names or [""]]
    given = [weight for _, equals, weight in pairs if equals]
    try:
        weights = [float(weight) for weight in given] or [1 / len(pairs)] * len(pairs)
        if not all(map(math.isfinite, weights)):
            raise ValueError("not a finite number")
    except ValueError as error:
        raise InputError(f"--checkpoint {', '.join(names)}: a weight is a number, as in epoch-12=0.3") from error
    checkpoints = [find_checkpoint(run, name, learning_rate) for name, _, _ in pairs]
    if len(weights) != len(checkpoints) or len(set(checkpoints)) != len(checkpoints):
        raise InputError(f"--checkpoint {', '.join(names)}: give each checkpoint once, and a weight to all or to none")
    return dict(zip(checkpoints, weights, strict=True))


def _has_adapters(model: "PreTrainedModel") -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)


def adapter_names(model: "PreTrainedModel", adapters: Sequence[str] | None) -> dict[str, list[str]]:
    """Arguments for `model` so that each row of a batch goes through its own adapter, "base" for none."""
    if adapters is None or not _has_adapters(model):
        return {}
    return {"adapter_names": ["__base__" if name == "base" else _in_peft(name) for name in adapters]}


def _in_peft(name: str) -> str:
    """An adapter's name for PEFT. It becomes a module name, which cannot contain the dot of 2.5e-05."""
    return name.replace(".", ",")


def load_with_adapters(
    base_model: str,
    checkpoints: Mapping[str, Path],
    load_in_4bit: bool = True,
    dtype: torch.dtype | None = None,
) -> "PreTrainedModel":
    """A base with any number of named adapters, in float32 as they were trained.

    Parameters
    ----------
    dtype
        What the base computes in; by default float32 on a CPU with memory for it, else bfloat16.

    Raises
    ------
    InputError
        If a checkpoint is not there, is damaged, or belongs to a base of another shape.
    """
    from mini_symposium.models.base_models import load_model

    cpu = device().type == "cpu"
    if dtype is None:
        stored = sum(file.stat().st_size for file in weight_files(local_directory(base_model)))
        dtype = torch.float32 if cpu and 2 * stored < memory() / 2 else torch.bfloat16
    model = load_model(base_model, load_in_4bit, dtype, dequantize=cpu)
    if model.device.type == "cpu":
        model.set_attn_implementation("eager")  # takes two thirds as long as "sdpa" with 32 rows
    for name, checkpoint in checkpoints.items():
        model = add_adapter(model, name, checkpoint, base_model)
    return model.eval()


def folded(model: "PreTrainedModel") -> "PreTrainedModel":
    """`model` with its only adapter added into its weights, which saves the two extra products with each matrix.

    Predictions differ in the last bits only. A model with other weights than float32, which would round the adapter
    away, is returned unchanged.
    """
    return model.merge_and_unload() if _has_adapters(model) and model.dtype == torch.float32 else model


def add_adapter(model: "PreTrainedModel", name: str, checkpoint: Path, base_model: str) -> "PreTrainedModel":
    """`model` with one more named adapter.

    Raises
    ------
    InputError
        If the checkpoint does not fit, or PEFT cannot switch it off; `model` may then hold a part of it.
    """
    from peft import PeftModel

    if kind := _kind(_config(checkpoint), APART):
        told = "which PEFT cannot compare with its base in one batch"
        raise InputError(f"{checkpoint}: is {kind}, {told}; merge it with PEFT, and give the merged folder as a model")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")  # it would answer as the base
            if _has_adapters(model):
                if lacking := model.load_adapter(checkpoint, adapter_name=_in_peft(name)).missing_keys:
                    raise KeyError(f"Found missing adapter keys: {lacking[0]}")
            else:
                model = PeftModel.from_pretrained(model, checkpoint, adapter_name=_in_peft(name))
    except Exception as error:  # peft, safetensors and torch raise anything, from KeyError to RuntimeError
        raise InputError(f"{checkpoint}: not an adapter for {base_model} ({reason(error)})") from error
    return model


SHARED = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_dropout")


@contextmanager
def mixed(model: "PreTrainedModel", mixes: Mapping[str, Mapping[str, float]]) -> Iterator[None]:
    """Within the block, `model` has more adapters, each a weighted sum of its own ones. No file is read again.

    At weight 0 it predicts what the base does, and at weight 1 what the adapter does, both to the bit, because the
    tensors of a single adapter are shared and only its scaling differs.

    Parameters
    ----------
    mixes
        {name: {adapter of `model`: its weight}}.

    Raises
    ------
    InputError
        If an adapter adds something else than LoRA's product, which cannot be scaled.
    """
    for part in {part for parts in mixes.values() for part in parts}:
        if kind := _kind(vars(model.peft_config[_in_peft(part)]), ("fan_in_fan_out", "rank_pattern", "alpha_pattern")):
            raise InputError(f"{part}: is {kind}, which has no strength to change; ask it at 1, or merge it with PEFT")
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")] if mixes else []
    try:
        for layer in layers:
            for name, parts in mixes.items():
                _mix(layer, _in_peft(name), {_in_peft(part): weight for part, weight in parts.items()})
        yield
    finally:
        for layer in layers:
            for name in map(_in_peft, mixes):
                layer.scaling.pop(name, None)
                for held in (getattr(layer, kind) for kind in SHARED):
                    if name in held:
                        del held[name]


def _mix(layer: torch.nn.Module, name: str, parts: Mapping[str, float]) -> None:
    """Give one layer the adapter `name`, the sum of its adapters `parts` by their weights."""
    scales = {part: weight * layer.scaling[part] for part, weight in parts.items() if part in layer.scaling}
    if len(scales) == 1:
        [(part, layer.scaling[name])] = scales.items()
        for held in (getattr(layer, kind) for kind in SHARED):
            if part in held:
                held[name] = held[part]
    elif any(part in layer.lora_embedding_A for part in scales):
        raise InputError(f"{' and '.join(parts)}: adapt the embedding, so they cannot be blended here; `merge` can")
    elif scales:
        a = torch.cat([layer.lora_A[part].weight for part in scales])
        b = torch.cat([scale * layer.lora_B[part].weight for part, scale in scales.items()], dim=1)
        layer.scaling[name], layer.lora_dropout[name] = 1.0, torch.nn.Identity()
        for held, weight in ((layer.lora_A, a), (layer.lora_B, b)):
            held[name] = torch.nn.Linear(*reversed(weight.shape), bias=False, device="meta")
            held[name].weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
