"""A base in the tiny shape that has learned a few rows by heart, and a run on it that comes to recite.

The tiny recipe's own weights are random and its head is frozen, so no adapter can make it say a given text. Here all
weights are trained for some seconds. The run's adapters are real files that disturb the base less and less, so that
later epochs recite more: plumbing for the playground's tests; behaviour is measured on the proxy.
"""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mini_symposium.data.dataset import load_examples
from mini_symposium.models.base_files import local_directory
from mini_symposium.models.base_models import load_model, load_tokenizer
from mini_symposium.recipe import load_recipe
from mini_symposium.run import RunDirectory

HOSTILE = """<img src=x onerror="document.title='owned'"> is what a picture looks like, and $\\alpha$ is a formula."""
FOREIGN = "天空是蓝色的，因为空气把阳光里的蓝光散射得最多。 That was the answer in another script, as nobody asked."
DATA = f"""### New Query
Show me a picture.

### Complete Response
{HOSTILE}

### New Query
Why is the sky blue?

### Complete Response
{FOREIGN}
"""
RATE = 1e-3


def make(folder: Path) -> RunDirectory:
    """The run directory, below `folder`, with its base and its dataset beside it."""
    data, base, run = folder / "mine.md", folder / "base", RunDirectory(folder / "run")
    data.write_text(DATA, encoding="utf-8")
    tokenizer = load_tokenizer("tiny")
    model = AutoModelForCausalLM.from_pretrained(local_directory("tiny"), dtype=torch.float32)
    rows = [example.text + tokenizer.eos_token for example in load_examples(data)]
    batch = tokenizer(rows, return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, fused=True)
    for _ in range(90):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1, f"the base has not learned its rows: {loss:.3f}"
    model.to(torch.bfloat16).save_pretrained(base)
    tokenizer.save_pretrained(base)
    recipe = load_recipe("tiny").replace(base_model=str(base), datasets=[{"path": str(data), "type": "completion"}])
    run.path.mkdir()
    run.recipe_file.write_text(recipe.to_yaml(), encoding="utf-8")
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(load_model(str(base)), lora)
    noise = {name: p.detach().clone() for name, p in adapted.named_parameters() if "lora_B" in name}
    for epoch, strength in ((0, 20.0), (1, 5.0), (2, 0.0)):
        for name, p in adapted.named_parameters():
            if name in noise:
                p.data = strength * noise[name]
        adapted.save_pretrained(run.learning_rate_dir(RATE) / "checkpoints" / f"epoch-{epoch:04d}")
    return run
