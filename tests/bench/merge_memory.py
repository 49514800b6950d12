"""Merge a random checkpoint of a few of Mistral-7B's layers, in shards; print the predicted and the measured memory.

Arguments: the number of layers, a folder. Call it twice with the same arguments: the first call writes the checkpoint
and its adapter, the second merges them, so that the memory that writing takes is not measured.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import MistralConfig, MistralForCausalLM

from mini_symposium.models.merge import merge
from mini_symposium.models.safetensors_files import write_tensors

RANK, SHARD_BYTES = 16, 2**29


def write(folder: Path, layers: int) -> None:
    base, adapter = folder / "base", folder / "adapter"
    config = MistralConfig(num_hidden_layers=layers, dtype="bfloat16")
    config.save_pretrained(base)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in MistralForCausalLM(config).named_parameters()}
    shards, filled = [[]], 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if shards[-1] and filled + size > SHARD_BYTES:
            shards, filled = [*shards, []], 0
        shards[-1].append(name)
        filled += size
    for number, names in enumerate(shards):
        header = {name: torch.empty(shapes[name], dtype=torch.bfloat16, device="meta") for name in names}
        tensors = (torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02) for name in names)
        write_tensors(base / f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors", header, tensors)
    factors = {}
    for name, shape in shapes.items():
        if name.endswith("_proj.weight"):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{stem}.lora_A.weight"] = torch.randn(RANK, shape[1]) * 0.02
            factors[f"{stem}.lora_B.weight"] = torch.randn(shape[0], RANK) * 1e-4
    LoraConfig(r=RANK, lora_alpha=2 * RANK, base_model_name_or_path=str(base)).save_pretrained(adapter)
    save_file(factors, adapter / "adapter_model.safetensors")


def main(layers: str, folder: str) -> None:
    target = Path(folder)
    if not (target / "adapter").exists():
        write(target, int(layers))
        return
    merged = merge(target / "adapter", str(target / "base"), target / "merged", "nf4", "float32")
    written = sum(path.stat().st_size for path in (target / "merged").glob("*.safetensors"))
    print(json.dumps({**merged["memory"], "written": written}))


if __name__ == "__main__":
    main(*sys.argv[1:])
