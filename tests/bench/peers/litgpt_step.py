"""LitGPT's LoRA step in bfloat16, as its finetune/lora.py takes it, on the proxy's weights. Runs in .venv-bench.

Arguments: the model's directory, a JSON file with the token ids of one row.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import lightning
import torch
from bench.turns import Turn
from litgpt.config import Config as Shape
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.utils import chunked_cross_entropy

NAME = "SmolLM2-135M-Instruct"


def converted(source: Path) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / NAME
        shutil.copytree(source, model)
        convert_hf_checkpoint(model, model_name=NAME)
        return torch.load(model / "lit_model.pth", weights_only=True)


def main(source: str, row: str) -> None:
    turn = Turn()
    lora = {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")}
    shape = Shape.from_name(NAME)
    config = Config.from_name(NAME, lora_r=16, lora_alpha=32, lora_dropout=0.0, **lora)
    assert shape.n_layer == config.n_layer
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    with fabric.init_module():
        model = GPT(config)
    mark_only_lora_as_trainable(model)
    model = fabric.setup_module(model)
    missing, unexpected = model.load_state_dict(converted(Path(source)), strict=False)
    assert not unexpected
    assert all("lora" in name for name in missing), missing
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(adapters, lr=1e-4))
    ids = torch.tensor([json.loads(Path(row).read_text())])
    model.max_seq_length = ids.shape[1]
    model.train()

    def step() -> dict:
        logits = model(ids, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        loss = chunked_cross_entropy(logits, ids[..., 1:])
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return {"losses": [loss.item()]}

    turn.run(step)


if __name__ == "__main__":
    main(*sys.argv[1:])
