"""Train the recipe with TRL's SFTTrainer, and prove that the adapters moved.

Stock SFTTrainer casts LoRA weights to bfloat16 when the base is 4-bit. At 1e-7 that freezes the run
without a word: half a bfloat16 step around a typical element of lora_A is larger than one update, so
every update is rounded away. The rules here:

- adapters, their gradients and Adam's moments are float32 from the first step to the last checkpoint;
- what enters the loss is decided in `dataset.tokenize`, and checked again on the trainer's own batches;
- every logged learning rate equals the configured one;
- after training the share of elements that moved is measured, and a run that stood still fails.
"""

import importlib.util
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from mini_symposium import InputError, RunError
from mini_symposium.base_models import device, load_model, load_tokenizer
from mini_symposium.dataset import Example, Row, fingerprint, load_examples, tokenize
from mini_symposium.recipe import KEYS, Recipe, load_recipe
from mini_symposium.run_directory import RunDirectory, environment, read_jsonl, write_json, written_whole

MOVED_AT_LEAST = 0.99
"""Smallest share of lora_A's elements that must differ between the first and the last checkpoint."""

ADAPTER_FILES = {"adapter_model.safetensors", "adapter_config.json"}
RESUME_FILES = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


@dataclass(frozen=True)
class Travel:
    """How far the adapters moved from the first checkpoint to the last, beside what Adam's rule predicts.

    Adam moves an element by at most about one learning rate per step, so `dose` = learning_rate x steps
    bounds the travel; an element whose gradient changes sign at random goes only about
    learning_rate x sqrt(steps). While lora_B is still tiny, lora_A's gradient is smaller than Adam's
    eps = 1e-8 and A travels less than either.
    """

    learning_rate: float
    steps: int
    parameters: int
    dose: float
    a_moved_share: float
    a_travel_rms: float
    b_travel_rms: float
    b_travel_max: float


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


def prepare(
    recipe: str, dataset: str = "", run: str = "", num_epochs: int = 0
) -> tuple[Recipe, list[Example], RunDirectory]:
    """What the notebooks' parameters stand for; an empty one means the recipe's own choice, or runs/NAME."""
    changes = {"datasets": [{"path": dataset, "type": "completion"}]} if dataset else {}
    chosen = load_recipe(recipe, **changes, **({"num_epochs": num_epochs} if num_epochs else {}))
    return chosen, load_examples(chosen.dataset), RunDirectory(run or f"runs/{chosen.name}")


def train(
    recipe: Recipe,
    examples: Sequence[Example],
    run: RunDirectory,
    learning_rates: Sequence[float],
    checkpoint_epochs: Sequence[int] | None = None,
    report_to: str = "none",
    overwrite: bool = False,
) -> list[Travel]:
    """Train one adapter per learning rate into `run`, going on where an interrupted run left off.

    Parameters
    ----------
    checkpoint_epochs
        Epochs after which the adapter is kept; the recipe's own choice if None. 0 and the last are always kept.
    report_to
        Passed to the trainer: "none", "tensorboard", "trackio".

    Returns
    -------
    list of Travel
        One per learning rate: the measured movement and its bound.

    Raises
    ------
    InputError
        If `run` was made with another recipe or other data, or an example cannot be trained on.
    RunError
        If the loss is no number, or fewer than 99% of lora_A's elements moved.
    """
    if report_to != "none" and not importlib.util.find_spec(report_to):
        raise InputError(f"report_to={report_to!r}: there is no such package here; `pip install {report_to}` adds it")
    if overwrite:
        run.clear_training()
    rows = tokenize(examples, load_tokenizer(recipe.base_model), recipe.sequence_len, not recipe.train_on_inputs)
    _claim(run, recipe, examples)
    epochs = sorted(
        {0, recipe.num_epochs, *(recipe.checkpoint_epochs if checkpoint_epochs is None else checkpoint_epochs)}
    )
    if epochs[0] < 0 or epochs[-1] > recipe.num_epochs:
        raise InputError(f"checkpoint epochs {epochs}: they must lie between 0 and num_epochs = {recipe.num_epochs}")
    travels = []
    for rate in learning_rates:
        if recipe.num_epochs not in run.checkpoints(rate):
            _train_one(recipe.replace(learning_rate=rate), rows, run, epochs, report_to)
        travels.append(prove_movement(run, rate))
    return travels


def _claim(run: RunDirectory, recipe: Recipe, examples: Sequence[Example]) -> None:
    """Write what this run is; refuse a directory that is already something else."""
    data = fingerprint(examples)
    if run.recipe_file.exists():
        kept = load_recipe(run.recipe_file)
        differing = [key for key in KEYS if getattr(kept, key) != getattr(recipe, key)]
        if differing:
            raise InputError(
                f"{run.recipe_file}: this run was made with another {', '.join(differing)}; "
                "choose another run directory, or pass --overwrite"
            )
        if json.loads((run.path / "environment.json").read_text(encoding="utf-8"))["dataset_sha256"] != data:
            raise InputError(
                f"{run.path}: this run was made from other examples; choose another run, or pass --overwrite"
            )
        return
    hardware = torch.cuda.get_device_name() if device().type == "cuda" else "cpu"
    write_json(run.path / "environment.json", environment(device=hardware, seed=recipe.seed, dataset_sha256=data))
    with written_whole(run.recipe_file) as temporary:
        temporary.write_text(recipe.to_yaml(), encoding="utf-8")


def _train_one(recipe: Recipe, rows: Sequence[Row], run: RunDirectory, epochs: Sequence[int], report_to: str) -> None:
    folder = run.learning_rate_dir(recipe.learning_rate)
    scratch = folder / ".trainer"
    shutil.rmtree(scratch, ignore_errors=True)
    disable_progress_bars()
    trainer = build_trainer(recipe, rows, scratch, folder / "checkpoints", report_to)
    log = Log(folder / "metrics.jsonl", rows, trainer.order, recipe, epochs)
    trainer.add_callback(log)
    trainer.remove_callback(PrinterCallback)  # it would print every step
    resume = [path for path in run.checkpoints(recipe.learning_rate).values() if (path / "optimizer.pt").exists()]
    if not run.checkpoints(recipe.learning_rate):
        with written_whole(folder / "checkpoints" / "epoch-0000") as temporary:
            trainer.model.save_pretrained(temporary)
            keep_only(temporary, ADAPTER_FILES)
    check_batches(trainer, rows)
    try:
        trainer.train(resume_from_checkpoint=str(resume[-1]) if resume else None)
    finally:
        log.close()
        shutil.rmtree(scratch, ignore_errors=True)


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


def prove_movement(run: RunDirectory, learning_rate: float) -> Travel:
    """Compare the first and the last checkpoint element by element.

    Raises
    ------
    RunError
        If fewer than 99% of lora_A's elements, or of lora_B's, differ.
    """
    checkpoints = run.checkpoints(learning_rate)
    first, last = (
        load_file(checkpoints[epoch] / "adapter_model.safetensors") for epoch in (min(checkpoints), max(checkpoints))
    )
    deltas = {
        part: torch.cat([(last[k] - first[k]).flatten() for k in first if part in k]) for part in ("lora_A", "lora_B")
    }
    moved = {part: (delta != 0).float().mean().item() for part, delta in deltas.items()}
    if min(moved.values()) < MOVED_AT_LEAST:
        raise RunError(
            f"{run.learning_rate_dir(learning_rate)}: only {moved['lora_A']:.2%} of lora_A and "
            f"{moved['lora_B']:.2%} of lora_B moved in training, {MOVED_AT_LEAST:.0%} are needed: updates of this size "
            "are lost to rounding (adapters not in float32?) or to Adam's eps (too few steps?)"
        )
    steps = run.metrics(learning_rate)[-1]["step"]
    return Travel(
        learning_rate=learning_rate,
        steps=steps,
        parameters=sum(delta.numel() for delta in deltas.values()),
        dose=learning_rate * steps,
        a_moved_share=moved["lora_A"],
        a_travel_rms=deltas["lora_A"].square().mean().sqrt().item(),
        b_travel_rms=deltas["lora_B"].square().mean().sqrt().item(),
        b_travel_max=deltas["lora_B"].abs().max().item(),
    )
