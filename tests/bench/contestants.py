"""The contestants that run in the kit's own environment. Argument: a job as JSON, {"kind": one of KINDS, its options}.

The options `rows` and `prompts` are paths of JSON files: a list of rows of token ids, a list of prompts. Every kind
that trains uses rank 16 on all linear layers, alpha 32, and AdamW at 1e-4.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from bench.turns import Turn
from mini_symposium.data.dataset import Row
from mini_symposium.models.adapters import load_with_adapters
from mini_symposium.models.base_files import local_directory
from mini_symposium.models.base_models import load_model, load_tokenizer, nf4
from mini_symposium.models.devices import device
from mini_symposium.models.generation import generate
from mini_symposium.recipe import load_recipe
from mini_symposium.run import Training
from mini_symposium.training import finetune, fused_lora, memory_plan
from mini_symposium.training.log import Log
from mini_symposium.training.memory_plan import choose

RATE, STEPS = 1e-4, 7800
ADAPTER_SIZE = 3 * 16
"""At most three factors of rank 16 share a matrix product; every other dimension in a step is larger than this."""
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


class Turns(TrainerCallback):
    """Makes each step of a Trainer a turn, with all that the Trainer does between two steps."""

    def __init__(self, turn: Turn, losses, profile: bool = False):
        self.turn, self.losses, self.profiler = turn, losses, profiler() if profile else None

    def on_step_begin(self, args, state, control, **kwargs):
        measured = {"losses": self.losses(state)} if state.global_step else {}
        if self.profiler and state.global_step > 1:
            self.profiler.stop()
            measured["profile"] = milliseconds(self.profiler)
        if not self.turn.wait(**measured):
            sys.exit()
        if self.profiler and state.global_step:
            self.profiler = profiler()
            self.profiler.start()


def profiler() -> torch.profiler.profile:
    return torch.profiler.profile(record_shapes=True)


def milliseconds(profiler: torch.profiler.profile) -> dict[str, float]:
    """Processor time of the profiled operations by kind of work."""
    kinds = {
        "attention's products": ("bmm",),
        "products with the base and the head": ("mm", "mkldnn", "linear"),
        "compiled elementwise work": ("CompiledFxGraph", "graph_", "cpp_fused", "Torch-Compiled", "CompiledFunction"),
        "optimizer and gradient norm": ("adam", "_foreach_norm", "_foreach_mul", "linalg_vector_norm", "clip"),
        "softmax": ("softmax", "exp", "sum", "amax", "div"),
        "copies and casts": ("copy", "_to_copy", "cat", "clone", "fill", "zero"),
    }
    adapters = "products with the adapters"
    totals = dict.fromkeys([adapters, *kinds, "the rest"], 0.0)
    for event in profiler.key_averages(group_by_input_shape=True):
        name = event.key.removeprefix("aten::")
        kind = next((kind for kind, parts in kinds.items() if any(part in name for part in parts)), "the rest")
        if name in ("mm", "addmm") and any(size <= ADAPTER_SIZE for shape in event.input_shapes for size in shape):
            kind = adapters
        totals[kind] += event.self_cpu_time_total / 1000
    return {kind: round(total, 1) for kind, total in totals.items()}


def ours(turn, base, rows, adapters=1, only=None, fast=True, profile=False, float32=False, threads=0, **forced):
    """The kit's own training, with its log; of its adapters `only` one, if given.

    `forced` overrides fields of the memory plan that it chose.
    """
    if threads:
        torch.set_num_threads(threads)
    if profile:  # a profiler does not see the products that compiled code calls
        fused_lora.OPTIONS = {}
    if float32:  # as on a processor that does not multiply in bfloat16
        memory_plan.training_dtype = finetune.training_dtype = lambda: torch.float32
    recipe = load_recipe("proxy", base_model=base, sequence_len=max(map(len, rows)), num_epochs=STEPS)
    rates = [RATE / (k + 1) for k in range(adapters) if only in (None, k)]
    chosen = choose(recipe, len(rates), recipe.sequence_len, STEPS, fast)
    chosen = replace(chosen, **({"together": len(rates)} | forced))
    examples = [Row(ids, [1] * len(ids), "bench") for ids in rows]
    with tempfile.TemporaryDirectory() as folder:
        trainings = [Training.of(recipe.replace(learning_rate=rate), Path(folder)) for rate in rates]
        trainer = finetune.build_trainer(trainings, examples, Path(folder) / "scratch", chosen)
        trainer.add_callback(Log(trainer, examples, []))
        trainer.add_callback(Turns(turn, lambda state: trainer.losses.tolist(), profile))
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def stock_trl(turn, base, rows, checkpointing=False):
    """TRL's SFTTrainer as its documentation shows it: an NF4 base and a LoRA configuration, the rest by default."""
    cpu = device().type == "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        local_directory(base), quantization_config=nf4(), dtype=torch.bfloat16, device_map=None if cpu else {"": 0}
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=1,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_length=None,
            bf16=True,
            use_cpu=cpu,
            gradient_checkpointing=checkpointing,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list([{"input_ids": ids} for ids in rows]),
            processing_class=load_tokenizer(base),
            peft_config=LoraConfig(**LORA),
        )
        trainer.add_callback(Turns(turn, lambda state: [state.log_history[-1]["loss"]]))
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def bare_peft(turn, base, rows):
    """A training loop without a Trainer: transformers and PEFT in bfloat16, nothing quantised."""
    model = AutoModelForCausalLM.from_pretrained(local_directory(base), dtype=torch.bfloat16).to(device())
    model = get_peft_model(model, LoraConfig(**LORA)).train()
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=RATE, weight_decay=0.0)
    ids = torch.tensor([rows[0]], device=device())

    def step():
        with torch.autocast(device().type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"losses": [loss.item()]}

    turn.run(step)


def products(turn, size=4096, rows=1024):
    """Large bfloat16 matrix products, for the best rate that this machine reaches."""
    a, b = (torch.randn(n, size, device=device(), dtype=torch.bfloat16) for n in (rows, size))
    turn.run(lambda: [torch.mm(a, b) for _ in range(8)] and {"flop": 8 * 2 * rows * size * size})


def grid(turn, base, prompts, tokens):
    """All prompts as one batch."""
    model, tokenizer = load_with_adapters(base, {}, load_in_4bit=False), load_tokenizer(base)
    model.generation_config.eos_token_id = None  # so that every row has the same length
    turn.run(lambda: {"texts": [a.text for a in generate(model, tokenizer, prompts, None, tokens)]})


def loop(turn, base, prompts, tokens, dtype="float32"):
    """The model's own `generate`, one prompt at a time."""
    model, tokenizer = load_model(base, False, getattr(torch, dtype)).eval(), load_tokenizer(base)
    model.generation_config.eos_token_id = None

    def answer(prompt):
        ids = tokenizer(prompt, return_tensors="pt").to(model.device)
        output = model.generate(**ids, do_sample=False, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id)[
            0, ids["input_ids"].shape[1] :
        ].tolist()
        end = output.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in output else None
        return tokenizer.decode(output[:end], skip_special_tokens=True).strip()

    turn.run(lambda: {"texts": [answer(prompt) for prompt in prompts]})


KINDS = {kind.__name__: kind for kind in (ours, stock_trl, bare_peft, products, grid, loop)}


def main(job: str) -> None:
    turn = Turn(device().type)
    options = json.loads(job)
    for key in ("rows", "prompts"):
        if key in options:
            options[key] = json.loads(Path(options[key]).read_text())
    KINDS[options.pop("kind")](turn, **options)


if __name__ == "__main__":
    main(*sys.argv[1:])
