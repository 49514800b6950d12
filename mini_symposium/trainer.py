"""TRL's SFTTrainer with what this recipe needs: float32 adapters, an order that can be named, checkpoints by epoch."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from mini_symposium import RunError
from mini_symposium.base_models import device, load_model, load_tokenizer
from mini_symposium.dataset import Row
from mini_symposium.recipe import Recipe
from mini_symposium.run_directory import read_jsonl, written_whole

ADAPTER_FILES = {"adapter_model.safetensors", "adapter_config.json"}
RESUME_FILES = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


class EpochOrder(torch.utils.data.Sampler):
    """A fresh shuffle per epoch that depends on (seed, epoch) alone, so that any step can name its example."""

    def __init__(self, n_examples: int, seed: int):
        self.n_examples, self.seed, self.epoch = n_examples, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        return torch.randperm(self.n_examples, generator=generator).tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch))

    def __len__(self) -> int:
        return self.n_examples


def keep_only(folder: Path, names: set[str]) -> None:
    """Delete what a library also wrote there: a tokenizer, a model card."""
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


class RecipeTrainer(SFTTrainer):
    """SFTTrainer with float32 adapters, the plain loss, an order that can be named, and checkpoints by epoch."""

    def __init__(self, *args, order: EpochOrder, checkpoints: Path, **kwargs):
        self.order, self.checkpoints = order, checkpoints
        super().__init__(*args, **kwargs)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def _get_train_sampler(self, train_dataset=None) -> EpochOrder:
        return self.order

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # TRL's own loss also takes the entropy and accuracy of each token: a third of a step on a CPU, read by nobody.
        outputs = model(**inputs, use_cache=False)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _save_checkpoint(self, model, trial=None) -> None:
        # The Trainer writes to a folder of its own naming; only when that is complete does it get its real name.
        Trainer._save_checkpoint(self, model, trial)
        target = self.checkpoints / f"epoch-{round(self.state.epoch or 0):04d}"
        written = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        keep_only(written, ADAPTER_FILES | RESUME_FILES)
        written.rename(target)
        for older in self.checkpoints.glob("epoch-*"):
            if older != target:
                keep_only(older, ADAPTER_FILES)


class Log(TrainerCallback):
    """Write a line of metrics per step, ask for checkpoints at the chosen epochs, move the progress bar."""

    def __init__(self, path: Path, rows: Sequence[Row], order: EpochOrder, recipe: Recipe, epochs: Sequence[int]):
        self.path, self.rows, self.order, self.recipe, self.epochs = path, rows, order, recipe, epochs

    def on_train_begin(self, args, state, control, **kwargs):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = read_jsonl(self.path)[: state.global_step] if self.path.exists() else []
        with written_whole(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self.file = self.path.open("a", encoding="utf-8")
        label = f"learning rate {self.recipe.learning_rate:g}"
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=label, unit="step", mininterval=1)

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = time.perf_counter() - self.started

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        epoch, position = divmod(state.global_step - 1, len(self.rows))
        example = self.order.order(epoch)[position]
        if logs["learning_rate"] != self.recipe.learning_rate and self.recipe.lr_scheduler == "constant":
            raise RunError(
                f"step {state.global_step}: the learning rate is {logs['learning_rate']}, "
                f"the recipe says {self.recipe.learning_rate}"
            )
        if not math.isfinite(logs["loss"]):
            raise RunError(
                f"step {state.global_step}: the loss of {self.rows[example].source} is {logs['loss']}; "
                "the newest checkpoint is from before this step, lower the learning rate or look at that example"
            )
        line = {
            "step": state.global_step,
            "epoch": epoch,
            "example": example,
            "learning_rate": logs["learning_rate"],
            "loss": logs["loss"],
            "grad_norm": logs["grad_norm"],
            "tokens": len(self.rows[example].input_ids),
            "seconds": round(self.seconds, 4),
        }
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.bar.update()
        self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save = round(state.epoch) in self.epochs

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self):
        if hasattr(self, "file"):
            self.file.close()
            self.bar.close()


def build_trainer(
    recipe: Recipe, rows: Sequence[Row], output_dir: Path, checkpoints: Path, report_to: str = "none"
) -> RecipeTrainer:
    """The trainer for one learning rate: base model in NF4, LoRA on every linear layer, float32 adapters."""
    model = load_model(recipe.base_model, recipe.load_in_4bit)
    set_seed(recipe.seed)  # the adapter's random init must not depend on what ran before
    lora = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    arguments = SFTConfig(
        output_dir=str(output_dir),
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler,
        warmup_steps=0,
        num_train_epochs=recipe.num_epochs,
        per_device_train_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        optim=recipe.optimizer,
        weight_decay=recipe.weight_decay,
        gradient_checkpointing=recipe.gradient_checkpointing,
        packing=False,
        max_length=None,  # nothing is truncated: `tokenize` refuses what does not fit
        bf16=True,
        use_cpu=device().type == "cpu",
        logging_steps=1,
        save_strategy="no",  # `Log` asks for checkpoints
        report_to=report_to,
        disable_tqdm=True,
        seed=recipe.seed,
        dataloader_pin_memory=device().type == "cuda",
    )
    columns = [
        {
            "input_ids": row.input_ids,
            "labels": [i if m else -100 for i, m in zip(row.input_ids, row.completion_mask, strict=True)],
        }
        for row in rows
    ]
    return RecipeTrainer(
        model=get_peft_model(model, lora),
        args=arguments,
        train_dataset=Dataset.from_list(columns),
        processing_class=load_tokenizer(recipe.base_model),
        order=EpochOrder(len(rows), recipe.seed),
        checkpoints=checkpoints,
    )


def check_batches(trainer: RecipeTrainer, rows: Sequence[Row]) -> None:
    """Before step 1: the trainer's own first epoch holds these rows, whole, EOS in the loss, in the named order."""
    dtypes = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
    if dtypes != {torch.float32}:
        raise RunError(f"adapters are {dtypes}, not float32: at a low learning rate they would not move")
    for example, batch in zip(trainer.order.order(0), trainer.get_train_dataloader(), strict=True):
        row = rows[example]
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        wanted = [i if m else -100 for i, m in zip(row.input_ids, row.completion_mask, strict=True)]
        if ids != row.input_ids or labels != wanted or labels[-1] != trainer.processing_class.eos_token_id:
            raise RunError(f"{row.source}: the trainer's batch is not the tokenised row; do not trust this run")
