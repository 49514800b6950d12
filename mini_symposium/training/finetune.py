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
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datasets import disable_progress_bars
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PrinterCallback

from mini_symposium.data.dataset import Example, Row, fingerprint, load_examples, tokenize
from mini_symposium.errors import InputError, RunError
from mini_symposium.files.writing import alone, clear_away, write_json, written_whole
from mini_symposium.models.base_models import load_tokenizer
from mini_symposium.models.devices import device, out_of_memory, peak_memory
from mini_symposium.recipe import KEYS, Recipe, load_recipe
from mini_symposium.run import RunDirectory, environment, said_already
from mini_symposium.training import checkpoints, processes
from mini_symposium.training.log import Log, Part
from mini_symposium.training.memory_plan import Acceleration, choose
from mini_symposium.training.trainer import build_trainer, check_batches, save_adapter

REPORTERS = ("none", "tensorboard", "trackio")
"""To whom the trainer may report, if it is installed."""

SCRATCH = ".trainer"
"""A folder that transformers' trainer wants to have; nothing is kept in it."""

OVERWRITING = "overwriting.json"
"""In a run directory: what is being trained in place of what was there before."""
PATIENCE = 15.0
"""Seconds to wait for another process to leave a run."""

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
    processes.join()
    learning_rates = [recipe.replace(learning_rate=rate).learning_rate for rate in learning_rates]
    if len(set(learning_rates)) < len(learning_rates):
        raise InputError(f"learning rates {learning_rates}: give each once")
    _kept_epochs(recipe, checkpoint_epochs)  # what is wrong with them is said before anything is touched
    rows, probed = as_rows(recipe, examples), as_rows(recipe, held_out)
    jobs = [Job(recipe.replace(learning_rate=rate), run) for rate in learning_rates]
    with held([run]):
        if processes.writes():
            if overwrite:
                begun = {"recipe": recipe.to_yaml(), "dataset_sha256": fingerprint(examples), "rates": learning_rates}
                if not said_already(run.path / OVERWRITING, begun):  # or it was cut off, and goes on
                    run.clear_training()
                    write_json(run.path / OVERWRITING, begun)
            new = claim(run, recipe, examples)
        processes.wait()
        try:
            train_together(jobs, rows, checkpoint_epochs, report_to, fast, probed)
        except InputError:
            if processes.writes() and new and not any(job.folder.exists() for job in jobs):
                run.clear_training()  # so that what is mended is not refused as another run
            raise
        if not processes.writes():
            return []
        travels = [prove_movement(run, rate) for rate in learning_rates]
        (run.path / OVERWRITING).unlink(missing_ok=True)
        return travels


@contextmanager
def held(runs: Sequence[RunDirectory], patience: float = PATIENCE) -> Iterator[None]:
    """Be the only one who trains in `runs`; what killed writers left behind in them is cleared away first.

    A killed notebook's kernel takes a second to notice, hence the patience, in seconds.
    """
    with ExitStack() as stack:
        for path in sorted({run.path.absolute() for run in runs}) if processes.writes() else ():
            stack.enter_context(alone(path, ".training.lock", patience))
            clear_away(path)
            shutil.rmtree(path / SCRATCH, ignore_errors=True)
        yield


def as_rows(recipe: Recipe, examples: Sequence[Example]) -> list[Row]:
    """`examples` in the tokens of the recipe's base model, supervised as the recipe says."""
    return tokenize(examples, load_tokenizer(recipe.base_model), recipe.sequence_len, not recipe.train_on_inputs)


@dataclass(frozen=True)
class Job:
    """One adapter to train: its recipe, learning rate included, and the run that it belongs to."""

    recipe: Recipe
    run: RunDirectory

    @property
    def folder(self) -> Path:
        return self.run.learning_rate_dir(self.recipe.learning_rate)

    @property
    def finished(self) -> bool:
        last = self.run.checkpoints(self.recipe.learning_rate).get(self.recipe.num_epochs)
        return last is not None and last not in checkpoints.resumable(self.folder)[1]

    @property
    def resumable(self) -> set[int]:
        """Epochs whose checkpoint holds what going on needs; says which should and is damaged."""
        whole, damaged = checkpoints.resumable(self.folder)
        for path, why in damaged.items() if processes.writes() else ():
            print(f"{path}: damaged ({why}); going on from {f'epoch {max(whole)}' if whole else 'the beginning'}")
        return whole


def _kept_epochs(recipe: Recipe, wanted: Sequence[int] | None) -> list[int]:
    """The epochs after which adapters are kept, the first and the last among them."""
    epochs = list(recipe.checkpoint_epochs if wanted is None else wanted)
    if not all(type(epoch) is int and 0 <= epoch <= recipe.num_epochs for epoch in epochs):
        raise InputError(f"checkpoint epochs {epochs}: they must lie between 0 and num_epochs = {recipe.num_epochs}")
    return sorted({0, recipe.num_epochs, *epochs})


def train_together(
    jobs: Sequence[Job],
    rows: Sequence[Row],
    checkpoint_epochs: Sequence[int] | None = None,
    report_to: str = "none",
    fast: bool = True,
    held_out: Sequence[Row] = (),
) -> None:
    """Train what of `jobs` is not finished, in as few passes over the base as memory allows; see `train`.

    They share base model, number of epochs and the rows; rate, schedule, rank and seed are each its own.
    """
    recipe = jobs[0].recipe
    epochs = _kept_epochs(recipe, checkpoint_epochs)
    waiting = {job.folder.resolve() for job in jobs if not job.finished}
    if not waiting:
        for job in jobs if processes.writes() else ():  # it may have been killed while it tidied up
            checkpoints.put_aside_older(job.folder / "checkpoints", recipe.num_epochs)
        return
    # Killed between the last checkpoints of a pass, those who are through go the last stretch again with the others.
    cut_off = [job for job in jobs if checkpoints.companions(job.folder, recipe.num_epochs) & waiting]
    pending = [job for job in jobs if job in cut_off or not job.finished]
    longest = max(len(row.input_ids) for row in rows)
    if processes.count() > 1:
        chosen = Acceleration.off(f"{processes.count()} processes")
    else:
        chosen = choose(recipe, len(pending), longest, recipe.num_epochs * len(rows), fast)
    with held([job.run for job in pending]):
        if processes.writes():
            print(f"training: {chosen}")
        passes = _passes(pending, chosen.together)
        processes.wait()  # all of them have seen the same files; only then may one write
        for some, epoch in passes:
            if epoch == recipe.num_epochs:  # whole, and no longer in need of those it trained with
                continue
            # Memory may have changed since; what it decides may not, but for how many train at a time.
            compiled = checkpoints.compiled(some[0].folder, epoch) if epoch and chosen.fused else None
            own = chosen if compiled is None else replace(chosen, compiled=compiled)
            if own != chosen and processes.writes():
                print(f"going on as it began, layer {'' if compiled else 'not '}compiled, for the same last bits")
            try:
                _train_pass(some, rows, epochs, epoch, own, report_to, held_out)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                raise RunError(f"memory ran out ({error}); {_less(chosen, longest)}") from error


def _less(chosen: Acceleration, longest: int) -> str:
    """What would take less memory than `chosen`, the cheapest first."""
    knobs = [f"train fewer than {chosen.together} rates in one pass (LEARNING_RATES)"] * (chosen.together > 1)
    knobs += ["keep the base in 4 bits (FAST=False)"] * chosen.resident
    knobs += ["set gradient_checkpointing: true"] * (not chosen.checkpointing)
    return ", or ".join([*knobs, f"shorten the longest example, {longest} tokens, and with it sequence_len"])


def _passes(jobs: Sequence[Job], together: int) -> list[tuple[Sequence[Job], int | None]]:
    """Jobs to train together, and the epoch to go on from: those that shared a pass share it again.

    They go on from the newest epoch that they have in common; without one, each from its own. But where none has more
    than its first checkpoint, the pass was cut off while these were written, and begins again.
    """
    kept = [job.resumable for job in jobs]
    records = [
        checkpoints.companions(job.folder, max(epochs)) for job, epochs in zip(jobs, kept, strict=True) if epochs
    ]
    groups: dict[frozenset[Path], list[int]] = {}
    for number, job in enumerate(jobs):
        shared = next((record for record in records if job.folder.resolve() in record), set())
        groups.setdefault(frozenset(shared), []).append(number)
    passes = []
    for numbers in groups.values():
        some, epochs = [jobs[number] for number in numbers], [kept[number] for number in numbers]
        common = set.intersection(*epochs)
        if not common and max(map(len, epochs)) > 1:
            passes += [([job], max(own, default=None)) for job, own in zip(some, epochs, strict=True)]
        else:
            parts = [some[start : start + together] for start in range(0, len(some), together)]
            passes += [(part, max(common, default=None)) for part in parts]
    return passes


def claim(run: RunDirectory, recipe: Recipe, examples: Sequence[Example]) -> bool:
    """Write what this run is, True if nobody had; refuse a directory that is already something else."""
    data = fingerprint(examples)
    if run.recipe_file.exists():
        kept = load_recipe(run.recipe_file)
        differing = [key for key in KEYS if getattr(kept, key) != getattr(recipe, key)]
        if differing:
            raise InputError(
                f"{run.recipe_file}: this run was made with another {', '.join(differing)}; "
                "choose another run directory, or pass --overwrite"
            )
        if run.environment().get("dataset_sha256") != data:
            raise InputError(
                f"{run.path}: this run was made from other examples; choose another run, or pass --overwrite"
            )
        return False
    hardware = torch.cuda.get_device_name() if device().type == "cuda" else "cpu"
    write_json(run.environment_file, environment(device=hardware, seed=recipe.seed, dataset_sha256=data))
    with written_whole(run.recipe_file) as temporary:
        temporary.write_text(recipe.to_yaml(), encoding="utf-8")
    return True


def _train_pass(
    jobs: Sequence[Job],
    rows: Sequence[Row],
    epochs: Sequence[int],
    start: int | None,
    chosen: Acceleration,
    report_to: str,
    held_out: Sequence[Row],
) -> None:
    """Train one adapter per job over one base, from epoch `start` or from the beginning."""
    parts = [Part(f"adapter{k}", job.recipe, job.folder) for k, job in enumerate(jobs)]
    scratch = jobs[0].run.path / SCRATCH
    disable_progress_bars()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        trainer = build_trainer(parts, rows, scratch, chosen, report_to)
        last = jobs[0].recipe.num_epochs
        log = Log(trainer, parts, rows, epochs, held_out, {*range(0, last, max(10, last // 10)), last})
        stack.callback(log.close)
        trainer.add_callback(log)
        trainer.remove_callback(PrinterCallback)  # it would print every step
        for part in parts:
            first = part.checkpoints / "epoch-0000"
            if processes.writes() and not first.exists():
                with written_whole(first) as temporary:
                    save_adapter(trainer.model, part.name, temporary)
        check_batches(trainer, rows)
        resume = parts[0].checkpoints / f"epoch-{start:04d}" if start is not None else None
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        for run in {job.run.path: job.run for job in jobs if processes.writes()}.values():
            found = run.environment()
            write_json(run.environment_file, {**found, "peak_bytes": max(peak_memory(), found.get("peak_bytes", 0))})


def prove_movement(run: RunDirectory, learning_rate: float) -> Travel:
    """Compare the first and the last checkpoint element by element.

    Raises
    ------
    RunError
        If fewer than 99% of lora_A's elements, or of lora_B's, differ.
    """
    checkpoints = run.checkpoints(learning_rate)
    first, last = (_adapter(checkpoints[epoch]) for epoch in (min(checkpoints), max(checkpoints)))
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


def _adapter(checkpoint: Path) -> dict[str, torch.Tensor]:
    path = checkpoint / "adapter_model.safetensors"
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: cannot be read ({error}), so nothing shows that the adapter moved") from error


if (
    __name__ == "__main__"
):  # accelerate launch -m mini_symposium.training.finetune --recipe R --run DIR: `mini-symposium train`
    from mini_symposium.cli.main import main

    main(["train", *sys.argv[1:]])
