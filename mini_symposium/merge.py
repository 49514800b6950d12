"""Add an adapter into its base, in float32, so that the result needs no peft; and show that nothing was lost.

At a very low learning rate the whole fine-tune is a perturbation of about 1e-5 on weights of about 1e-2.
bfloat16 keeps eight bits: saved in it, most of such a change is rounded away. Hence float32 arithmetic and,
unless asked otherwise, float32 files.

QLoRA trains against the *dequantised NF4* base. Merging onto the original weights is therefore a slightly
different model; both are offered, and `compare` measures each against base + adapter.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_symposium import InputError, __version__
from mini_symposium.base_models import device, local_directory
from mini_symposium.run_directory import write_json, written_whole

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BASES = ("original", "nf4")


def merge(checkpoint: Path, base_model: str, out: Path, base: str = "original", dtype: str = "float32") -> dict:
    """Write base + adapter as safetensors with config and tokenizer into `out`, one base file after another.

    Parameters
    ----------
    base
        "original": the weights as they came. "nf4": what training saw, quantised and dequantised again.
    dtype
        Of the file. The sum is always taken in float32.

    Returns
    -------
    dict
        The provenance that is also written to `out`/merge.json.

    Raises
    ------
    InputError
        If `out` exists, the adapter is damaged, or it does not fit the base. `out` is then as it was.
    """
    if base not in BASES or dtype not in DTYPES:
        raise InputError(f"base={base!r}, dtype={dtype!r}: base is one of {BASES}, dtype one of {tuple(DTYPES)}")
    if out.exists():
        raise InputError(f"{out}: is there already; choose another folder or delete it")
    source = local_directory(base_model)
    factors, scaling = _read_adapter(checkpoint)
    provenance = {
        "base_model": base_model,
        "checkpoint": f"{checkpoint.parent.parent.name}/{checkpoint.name}",
        "base": base,
        "dtype": dtype,
        "scaling": scaling,
        "mini_symposium": __version__,
    }
    with written_whole(out) as temporary:
        temporary.mkdir()
        merged = 0
        for shard in sorted(source.glob("*.safetensors")):
            tensors = {}
            with safe_open(shard, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (a safetensors file is not a mapping)
                    weight = file.get_tensor(name)
                    if name in factors:
                        weight = _add(name, weight, *factors[name], scaling, base)
                        merged += 1
                    tensors[name] = weight.to(DTYPES[dtype]) if weight.is_floating_point() else weight
            save_file(tensors, temporary / shard.name, metadata={"format": "pt"})
        if merged != len(factors):
            raise InputError(
                f"{checkpoint}: {len(factors) - merged} of its layers are not in {base_model}; another base?"
            )
        for path in source.iterdir():
            if path.suffix in (".json", ".jinja", ".model"):
                shutil.copyfile(path, temporary / path.name)
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        write_json(temporary / "config.json", {**config, "dtype": dtype})
        write_json(temporary / "merge.json", provenance)
    return provenance


def _read_adapter(checkpoint: Path) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], float]:
    """{weight name in the base: (A (r, in), B (out, r))} and the scaling lora_alpha / r."""
    try:
        config = PeftConfig.from_pretrained(checkpoint)
        tensors = load_file(checkpoint / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{checkpoint}: not a whole adapter ({str(error).splitlines()[0]})") from error
    factors = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            weight = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            factors[weight] = (a.float(), tensors[name.replace("lora_A", "lora_B")].float())
    return factors, config.lora_alpha / config.r


def _add(name: str, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, base: str) -> torch.Tensor:
    if (b.shape[0], a.shape[1]) != tuple(weight.shape):
        raise InputError(f"{name}: the adapter is for {b.shape[0]} x {a.shape[1]}, the base has {tuple(weight.shape)}")
    if base == "nf4":
        # The very call that loading in 4-bit makes, so these are the numbers that training saw.
        packed, state = quantize_4bit(weight.to(device()), quant_type="nf4", compress_statistics=True)
        weight = dequantize_4bit(packed, state).cpu()
    return weight.float() + scaling * (b @ a)


@torch.inference_mode()
def logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[torch.Tensor]:
    """Next-token logits at every position of each text, (T, vocabulary) in float32 on the CPU."""
    batches = [tokenizer(text, return_tensors="pt").to(model.device) for text in texts]
    return [model.eval()(**batch).logits[0].float().cpu() for batch in batches]


def compare(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> dict[str, float]:
    """How far the predictions `other` are from `reference`, over every position of every text.

    Returns
    -------
    dict
        largest: biggest difference of a logit; kl: mean KL(reference || other) in nats per token;
        same_choice: share of positions at which both prefer the same token.
    """
    largest, kl, same, positions = 0.0, 0.0, 0, 0
    for p, q in zip(reference, other, strict=True):  # one text at a time: a vocabulary's logits are large
        largest = max(largest, (p - q).abs().max().item())
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        positions += len(p)
    return {"largest": largest, "kl": kl / positions, "same_choice": same / positions}
