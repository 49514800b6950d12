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
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import disable_progress_bars
from safetensors.torch import load_file
from transformers import PrinterCallback

from mini_symposium import InputError, RunError
from mini_symposium.acceleration import Acceleration, choose
from mini_symposium.base_models import device, load_tokenizer, peak_memory
from mini_symposium.dataset import Example, Row, fingerprint, load_examples, tokenize
from mini_symposium.recipe import KEYS, Recipe, load_recipe
from mini_symposium.run_directory import RunDirectory, environment, write_json, written_whole
from mini_symposium.trainer import build_trainer, check_batches, save_adapter
from mini_symposium.training_log import Log, Part

REPORTERS = ("none", "tensorboard", "trackio")
"""To whom the trainer may report, if it is installed."""

MOVED_AT_LEAST = 0.99
"""Smallest share of lora_A's elements that must differ between the first and the last checkpoint."""


@dataclass(frozen=True)
class Travel:
    """How far the adapters moved from the first checkpoint to the last, beside what Adam's rule predicts.

    While its gradient keeps its sign, Adam moves an element by about one learning rate a step, so `dose` =
    learning_rate x steps is about how far it can go; one whose gradient changes sign at random goes about
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
    fast: bool = True,
    held_out: Sequence[Example] = (),
) -> list[Travel]:
    """Train one adapter per learning rate into `run`, going on where an interrupted run left off.

    Where memory allows, all of them in one pass over the shared base.

    Parameters
    ----------
    checkpoint_epochs
        Epochs after which the adapter is kept; the recipe's own choice if None. 0 and the last are always kept.
    report_to
        Passed to the trainer: "none", "tensorboard", "trackio".
    fast
        False: PEFT's own layers and one rate after another, to compare with.
    held_out
        Examples that are not trained on; their loss is measured after every tenth of the run, but at most every
        tenth epoch, so that it takes less than a tenth of the time.

    Returns
    -------
    list of Travel
        One per learning rate: the measured movement, and the dose that predicts it.

    Raises
    ------
    InputError
        If `run` was made with another recipe or other data, or an example cannot be trained on.
    RunError
        If the loss is no number, or fewer than 99% of lora_A's elements moved.
    """
    if report_to not in REPORTERS:
        raise InputError(f"report_to={report_to!r}: is one of {', '.join(REPORTERS)}")
    if report_to != "none" and not importlib.util.find_spec(report_to):
        raise InputError(f"report_to={report_to!r}: there is no such package here; `pip install {report_to}` adds it")
    learning_rates = [recipe.replace(learning_rate=rate).learning_rate for rate in learning_rates]
    if len(set(learning_rates)) < len(learning_rates):
        raise InputError(f"learning rates {learning_rates}: give each once")
    wanted = list(recipe.checkpoint_epochs if checkpoint_epochs is None else checkpoint_epochs)
    if not all(type(epoch) is int and 0 <= epoch <= recipe.num_epochs for epoch in wanted):
        raise InputError(f"checkpoint epochs {wanted}: they must lie between 0 and num_epochs = {recipe.num_epochs}")
    epochs = sorted({0, recipe.num_epochs, *wanted})
    if overwrite:
        run.clear_training()
    tokenizer = load_tokenizer(recipe.base_model)
    rows, probed = (
        tokenize(some, tokenizer, recipe.sequence_len, not recipe.train_on_inputs) for some in (examples, held_out)
    )
    _claim(run, recipe, examples)
    pending = [rate for rate in learning_rates if recipe.num_epochs not in run.checkpoints(rate)]
    if pending:
        longest = max(len(row.input_ids) for row in rows)
        chosen = choose(recipe, len(pending), longest, recipe.num_epochs * len(rows), fast)
        print(f"training: {chosen}")
        for rates, epoch in _passes(pending, run, chosen.together):
            recipes = [recipe.replace(learning_rate=rate) for rate in rates]
            _train_pass(recipes, rows, run, epochs, epoch, chosen, report_to, probed)
    return [prove_movement(run, rate) for rate in learning_rates]


def _passes(rates: Sequence[float], run: RunDirectory, together: int) -> list[tuple[Sequence[float], int | None]]:
    """Rates to train together, and the epoch to go on from: one that they have in common, or each its own."""
    kept = {
        rate: {epoch for epoch, path in run.checkpoints(rate).items() if (path / "optimizer.pt").exists()}
        for rate in rates
    }
    common = set.intersection(*kept.values())
    if not common and any(kept.values()):
        return [([rate], max(kept[rate], default=None)) for rate in rates]
    parts = [rates[start : start + together] for start in range(0, len(rates), together)]
    return [(part, max(common, default=None)) for part in parts]


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
        if run.environment()["dataset_sha256"] != data:
            raise InputError(
                f"{run.path}: this run was made from other examples; choose another run, or pass --overwrite"
            )
        return
    hardware = torch.cuda.get_device_name() if device().type == "cuda" else "cpu"
    write_json(run.environment_file, environment(device=hardware, seed=recipe.seed, dataset_sha256=data))
    with written_whole(run.recipe_file) as temporary:
        temporary.write_text(recipe.to_yaml(), encoding="utf-8")


def _train_pass(
    recipes: Sequence[Recipe],
    rows: Sequence[Row],
    run: RunDirectory,
    epochs: Sequence[int],
    start: int | None,
    chosen: Acceleration,
    report_to: str,
    held_out: Sequence[Row],
) -> None:
    """Train one adapter per recipe over one base, from epoch `start` or from the beginning."""
    folders = [run.learning_rate_dir(recipe.learning_rate) for recipe in recipes]
    parts = [
        Part(f"adapter{k}", recipe, folder) for k, (recipe, folder) in enumerate(zip(recipes, folders, strict=True))
    ]
    scratch = run.path / ".trainer"
    shutil.rmtree(scratch, ignore_errors=True)
    disable_progress_bars()
    trainer = build_trainer(parts, rows, scratch, chosen, report_to)
    last = recipes[0].num_epochs
    log = Log(trainer, parts, rows, epochs, held_out, {*range(0, last, max(10, last // 10)), last})
    trainer.add_callback(log)
    trainer.remove_callback(PrinterCallback)  # it would print every step
    for part in parts:
        first = part.checkpoints / "epoch-0000"
        if not first.exists():
            with written_whole(first) as temporary:
                save_adapter(trainer.model, part.name, temporary)
    check_batches(trainer, rows)
    try:
        resume = parts[0].checkpoints / f"epoch-{start:04d}" if start is not None else None
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        found = run.environment()
        write_json(run.environment_file, {**found, "peak_bytes": max(peak_memory(), found.get("peak_bytes", 0))})
    finally:
        log.close()
        shutil.rmtree(scratch, ignore_errors=True)


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
