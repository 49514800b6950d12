"""Merge a random checkpoint of a few of Mistral-7B's layers, in shards; print what memory was predicted and measured.

Arguments: how many layers, a folder. Called twice: the first call writes the checkpoint and its adapter, so that what
that takes is not counted in the second, which merges.
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

RANK, SHARD = 16, 2**29


def write(folder: Path, layers: int) -> None:
    base, adapter = folder / "base", folder / "adapter"
    config = MistralConfig(num_hidden_layers=layers, dtype="bfloat16")
    config.save_pretrained(base)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in MistralForCausalLM(config).named_parameters()}
    shards, held = [[]], 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if shards[-1] and held + size > SHARD:
            shards, held = [*shards, []], 0
        shards[-1].append(name)
        held += size
    for number, names in enumerate(shards):
        layout = {name: (torch.bfloat16, shapes[name]) for name in names}
        tensors = (torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02) for name in names)
        write_tensors(base / f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors", layout, tensors)
    factors = {}
    for name, shape in shapes.items():
        if name.endswith("_proj.weight"):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{stem}.lora_A.weight"] = torch.randn(RANK, shape[1]) * 0.02
            factors[f"{stem}.lora_B.weight"] = torch.randn(shape[0], RANK) * 1e-4
    LoraConfig(r=RANK, lora_alpha=2 * RANK, base_model_name_or_path=str(base)).save_pretrained(adapter)
    save_file(factors, adapter / "adapter_model.safetensors")


def main(layers: str, folder: str) -> None:
    where = Path(folder)
    if not (where / "adapter").exists():
        write(where, int(layers))
        return
    made = merge(where / "adapter", str(where / "base"), where / "merged", "nf4", "float32")
    written = sum(path.stat().st_size for path in (where / "merged").glob("*.safetensors"))
    print(json.dumps({**made["memory"], "written": written}))


if __name__ == "__main__":
    main(*sys.argv[1:])
