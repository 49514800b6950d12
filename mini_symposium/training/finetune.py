"""Train the recipe with TRL's SFTTrainer, and check that the adapters moved.

Stock SFTTrainer casts LoRA weights to bfloat16 when the base is 4-bit. At 1e-7 that freezes the run silently: half a
bfloat16 step around a typical element of lora_A is larger than one update, so every update is rounded away. The rules
here:

- adapters, their gradients and Adam's moments are float32 from the first step to the last checkpoint;
- what enters the loss is decided in `dataset.tokenize`, and checked again on the trainer's own batches;
- every logged learning rate equals the configured one;
- after training the share of elements that moved is measured, and a run that did not move fails.

`train_pass` is the training itself, straight down: data, model, adapters, trainer, training. `train` is what notebooks
and commands call: it adds locking and resuming, and refuses a recipe or dataset other than the run's own.
"""

import importlib.util
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel, PrinterCallback, set_seed
from trl import SFTConfig

from mini_symposium.data.dataset import Example, Row, fingerprint, recipe_examples, tokenize
from mini_symposium.data.prompt_formats import FORMATS
from mini_symposium.errors import InputError, RunError
from mini_symposium.files.writing import alone, clear_away, write_json, written_whole
from mini_symposium.models.base_models import (
    check_embedded,
    check_special_tokens,
    compute_in_float32,
    load_model,
    load_tokenizer,
    shape_of,
)
from mini_symposium.models.devices import device, out_of_memory, peak_memory, processes, training_dtype
from mini_symposium.recipe import Recipe, load_recipe
from mini_symposium.run import RunDirectory, Training, overwrite_once
from mini_symposium.training import checkpoints
from mini_symposium.training.log import Log
from mini_symposium.training.memory_plan import Acceleration, choose
from mini_symposium.training.trainer import EpochOrder, RecipeTrainer, adapter_name, check_batches, save_adapter

REPORTERS = ("none", "tensorboard", "trackio")
"""Where the trainer may report, if installed."""

SCRATCH = ".trainer"
"""A folder that transformers' trainer wants to have; nothing is kept in it."""

OVERWRITING = "overwriting.json"
"""A file in a run directory until an --overwrite ends: it holds the recipe, dataset and rates."""
Stop = Callable[[Sequence[Training], int], bool]
"""Whether trainings that share a pass end after an epoch; asked with both. It may read what they have logged."""
Watch = Callable[[int], None]
"""Called with each epoch after which adapters are kept, when its metrics have been written."""
PATIENCE = 15.0
"""Seconds to wait for another process to release a run directory: a killed notebook's kernel takes a moment to exit."""

MOVED_AT_LEAST = 0.99
"""Smallest share of lora_A's elements that must differ between the first and the last checkpoint."""


def prepare(
    recipe: str, dataset: str = "", run: str = "", num_epochs: int = 0
) -> tuple[Recipe, list[Example], RunDirectory]:
    """The recipe, examples and run directory for the notebooks' parameters; an empty parameter means the recipe's own
    value, or runs/NAME."""
    changes = {"datasets": [{"path": dataset, "type": "completion"}]} if dataset else {}
    chosen = load_recipe(recipe, **changes, **({"num_epochs": num_epochs} if num_epochs else {}))
    return chosen, recipe_examples(chosen)[0], RunDirectory(run or f"runs/{chosen.name}")


def train_pass(
    trainings: Sequence[Training],
    rows: Sequence[Row],
    epochs: Sequence[int],
    start: int | None,
    chosen: Acceleration,
    report_to: str = "none",
    held_out: Sequence[Row] = (),
    stop: Stop | None = None,
    watch: Watch | None = None,
    probe_every: int = 0,
    ask: str = "",
) -> None:
    """Train one adapter for each of `trainings` over one base.

    They share base model, rows and number of epochs; each has its own learning rate, schedule, rank, seed and decay,
    and may leave out rows of its own.

    Parameters
    ----------
    epochs
        After which the adapters are kept, 0 and the last included.
    start
        The epoch to resume from; None for the beginning.
    probe_every
        How many epochs lie between two measurements of `held_out`; a tenth of all, but at least ten, if 0.
    ask
        A whole prompt, where that of `train` is a query.

    The other parameters, and what is raised, are those of `train`.
    """
    first, scratch = trainings[0], trainings[0].run / SCRATCH
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        trainer = build_trainer(trainings, rows, scratch, chosen, report_to)
        last = first.num_epochs
        crossed = any(training.left_out for training in trainings)
        probed = {*range(0, last, probe_every or (1 if crossed else max(10, last // 10))), last}
        interrupted = stack.enter_context(interrupts())

        def ends(epoch: int) -> bool:
            return bool(interrupted) or (stop is not None and stop(trainings, epoch))

        log = Log(trainer, rows, epochs, held_out, probed, ends, watch, ask)
        stack.callback(log.close)
        trainer.add_callback(log)
        trainer.remove_callback(PrinterCallback)  # it would print every step
        keep_first_adapters(trainer)
        check_batches(trainer, rows)
        trainer.train(resume_from_checkpoint=None if start is None else str(first.checkpoint(start)))
        record_peak_memory(trainings)
        if interrupted:
            print("stopped; all is kept, and the same call goes on from here")
            raise KeyboardInterrupt


@contextmanager
def interrupts() -> Iterator[list]:
    """A list that is empty until Ctrl-C, or a notebook's Stop button, is pressed; pressed again, it interrupts at once.

    Where interrupts are handled otherwise, or ignored, that stays so.
    """
    seen: list = []

    def note(number, frame) -> None:
        if seen:
            signal.default_int_handler(number, frame)
        seen.append(number)
        print("stopping at the end of this epoch; interrupt again to stop at once", flush=True)

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread() or processes().num_processes > 1:
        yield seen
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def build_trainer(
    trainings: Sequence[Training],
    rows: Sequence[Row],
    scratch: Path,
    chosen: Acceleration | None = None,
    report_to: str = "none",
) -> RecipeTrainer:
    """The trainer of a pass: rows, base model in NF4, LoRA on every linear layer, SFTTrainer's arguments.

    Without `chosen`, plain PEFT, and one training.
    """
    recipe, chosen = trainings[0].recipe, chosen or Acceleration.off("not chosen")
    disable_progress_bars()
    dataset = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    model = load_model(recipe.base_model, recipe.load_in_4bit)
    if training_dtype() == torch.float32:
        compute_in_float32(model)
    model = add_adapters(model, trainings)
    seeds, apart = [training.seed for training in trainings], [training.left_out for training in trainings]
    order = EpochOrder(len(rows), seeds, recipe.batch, apart)
    return RecipeTrainer(
        model=model,
        args=arguments(recipe, len(trainings), scratch, chosen, report_to),
        train_dataset=dataset,
        processing_class=load_tokenizer(recipe.base_model),
        trainings=trainings,
        order=order,
        acceleration=chosen,
        steps=recipe.num_epochs * order.steps,
    )


def add_adapters(model: PreTrainedModel, trainings: Sequence[Training]) -> PeftModel:
    """`model` with one LoRA adapter on every linear layer for each training, all of them trainable."""
    for k, training in enumerate(trainings):
        recipe = training.recipe
        set_seed(recipe.seed)  # an adapter's random start must not depend on what ran before
        lora = LoraConfig(
            r=recipe.lora_r,
            lora_alpha=recipe.lora_alpha,
            lora_dropout=recipe.lora_dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        if k == 0:
            model = get_peft_model(model, lora, adapter_name=adapter_name(k))
        else:
            model.add_adapter(adapter_name(k), lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)  # PEFT trains only the active adapter
    return model


def arguments(recipe: Recipe, adapters: int, scratch: Path, chosen: Acceleration, report_to: str) -> SFTConfig:
    """SFTTrainer's arguments; optimizer and schedule are `RecipeTrainer`'s, for each adapter has its own."""
    found = SFTConfig(
        output_dir=str(scratch),
        num_train_epochs=recipe.num_epochs,
        per_device_train_batch_size=adapters,
        gradient_accumulation_steps=_examples_each(recipe),
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        ddp_backend="gloo" if processes().num_processes > 1 and device().type == "cpu" else None,
        gradient_checkpointing=recipe.gradient_checkpointing and not chosen.fused,
        packing=False,
        max_length=None,  # nothing is truncated: `tokenize` refuses what does not fit
        bf16=training_dtype() == torch.bfloat16,
        use_cpu=device().type == "cpu",
        logging_strategy="no" if report_to == "none" else "steps",  # `Log` writes the metrics
        logging_steps=1,
        save_strategy="no",  # `Log` asks for checkpoints
        report_to=report_to,
        disable_tqdm=True,
        seed=recipe.seed,
        dataloader_pin_memory=device().type == "cuda",
        tf32=True if recipe.tf32 and device().type == "cuda" else None,
    )
    found._n_gpu = min(found.n_gpu, 1)  # without a launcher the Trainer would split the batch over all cards it sees
    return found


def _examples_each(recipe: Recipe) -> int:
    """Examples per step and process: all processes together take the recipe's batch."""
    count = processes().num_processes
    share, rest = divmod(recipe.batch, count)
    if rest or (count > 1 and recipe.lora_dropout):
        raise InputError(
            f"{count} processes share a batch of {recipe.batch} examples, with lora_dropout = {recipe.lora_dropout}; "
            "make it a multiple of their number, and the dropout 0"
        )
    return share


def keep_first_adapters(trainer: RecipeTrainer) -> None:
    """Write the adapters as they are before step 1, from which their movement is measured."""
    for name, training in zip(trainer.adapters, trainer.trainings, strict=True):
        start = training.checkpoint(0)
        if processes().is_main_process and not start.exists():
            with written_whole(start) as temporary:
                save_adapter(trainer.model, name, temporary)


def record_peak_memory(trainings: Sequence[Training]) -> None:
    """Put the most memory that training took into each run's environment.json."""
    for run in {training.run for training in trainings} if processes().is_main_process else ():
        found = RunDirectory(run).environment()
        peak = max(peak_memory(), found.get("peak_bytes", 0))
        write_json(RunDirectory(run).environment_file, {**found, "peak_bytes": peak})


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


def check_movement(run: RunDirectory, learning_rate: float) -> Travel:
    """Compare the first and the last checkpoint element by element.

    Raises
    ------
    RunError
        If fewer than 99% of lora_A's elements, or of lora_B's, differ.
    """
    kept = run.checkpoints(learning_rate)
    first, last = (_adapter(kept[epoch]) for epoch in (min(kept), max(kept)))
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
    stop: Stop | None = None,
    watch: Watch | None = None,
    ask: str = "",
) -> list[Travel]:
    """Train one adapter per learning rate into `run`; an interrupted run resumes at its last checkpoint.

    Where memory allows, all of them train in one pass over the shared base.

    Parameters
    ----------
    checkpoint_epochs
        Epochs after which the adapter is kept; the recipe's own choice if None. 0 and the last are always kept.
    report_to
        Passed to the trainer: "none", "tensorboard", "trackio".
    fast
        False: PEFT's own layers and one rate after another, to compare with.
    held_out
        Examples that are not trained on; those that the recipe itself holds out take their place. Their loss is
        measured after every tenth of the run, but at most every tenth epoch, so that it takes less than a tenth of the
        time.
    stop
        Asked after each epoch whether the run ends there, see `Stop`. The adapters of that epoch are kept, and the same
        call without `stop` goes on from them.
    watch
        Called after each epoch whose adapters are kept; without it, a line is printed.
    ask
        A query. While it trains, each adapter's answer is printed whenever it is kept.

    Returns
    -------
    list of Travel
        One per learning rate: the measured movement, and the dose that predicts it. Empty in all processes but the
        main one.

    Raises
    ------
    InputError
        If `run` was made with another recipe or other data, or an example cannot be trained on.
    RunError
        If the loss is not a number, or fewer than 99% of lora_A's elements moved.
    KeyboardInterrupt
        If interrupted, at the end of the epoch; the same call goes on from there.

    Examples
    --------
    >>> from mini_symposium import load_examples, load_recipe, train
    >>> recipe = load_recipe("tiny")
    >>> travels = train(
    ...     recipe, load_examples(recipe.dataset), RunDirectory("runs/tiny"), recipe.contrast
    ... )  # doctest: +SKIP
    """
    if report_to not in REPORTERS:
        raise InputError(f"report_to={report_to!r}: is one of {', '.join(REPORTERS)}")
    if report_to != "none" and not importlib.util.find_spec(report_to):
        raise InputError(f"report_to={report_to!r}: this package is not installed; `pip install {report_to}` adds it")
    if any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED")):
        raise InputError(
            "FSDP and DeepSpeed: adapters are saved whole here, not in shards; see data/accelerate/README.md"
        )
    trainings = [Training.of(recipe.replace(learning_rate=rate), run.path) for rate in learning_rates]
    if len({training.learning_rate for training in trainings}) < len(trainings):
        raise InputError(f"learning rates {list(learning_rates)}: give each once")
    _kept_epochs(recipe, checkpoint_epochs)  # a mistake in them is named before anything is touched
    rows = as_rows(recipe, examples)
    main = processes().is_main_process
    probed = held_out_rows(recipe, held_out, print if main else lambda line: None)
    for note in recipe.notes if main else ():
        print(note)
    if main and (told := dict.fromkeys(what for example in examples for _, what in example.notes)):
        more = f" and {len(told) - 1} more notes" if len(told) > 1 else ""
        print(f"{recipe.dataset}: {next(iter(told))}{more}; see mini-symposium inspect {recipe.dataset}")
    with locked([run.path]):
        if main:
            data = fingerprint(examples)
            if overwrite:
                begun = {"recipe": recipe.to_yaml(), "dataset_sha256": data, "rates": list(learning_rates)}
                made_from = {key: begun[key] for key in ("recipe", "dataset_sha256")}
                overwrite_once(run.path / OVERWRITING, begun, lambda: run.clear_training(made_from))
            new = record_recipe(run, recipe, data)
        processes().wait_for_everyone()
        try:
            prompt = FORMATS["new-query"].render(ask) if ask else ""
            options = {"report_to": report_to, "held_out": probed, "watch": watch, "ask": prompt}
            train_together(trainings, rows, checkpoint_epochs, fast, stop, **options)
        except InputError:
            if main and new and not any(training.folder.exists() for training in trainings):
                run.clear_training()  # so that a corrected recipe is not refused as another run
            raise
        if not main:
            return []
        travels = [check_movement(run, training.learning_rate) for training in trainings]
        (run.path / OVERWRITING).unlink(missing_ok=True)
        return travels


@contextmanager
def locked(runs: Sequence[Path], patience: float | None = None) -> Iterator[None]:
    """Lock these run directories against other training processes, and delete unfinished files of killed ones.

    `patience` is how many seconds to wait for another process, PATIENCE if None.
    """
    with ExitStack() as stack:
        for run in sorted({run.absolute() for run in runs}) if processes().is_main_process else ():
            stack.enter_context(alone(run, ".training.lock", PATIENCE if patience is None else patience))
            clear_away(run)
            shutil.rmtree(run / SCRATCH, ignore_errors=True)
        yield


def record_recipe(run: RunDirectory, recipe: Recipe, dataset_sha256: str) -> bool:
    """As `RunDirectory.record_recipe`, on this machine's device."""
    return run.record_recipe(recipe, dataset_sha256, torch.cuda.get_device_name() if device().type == "cuda" else "cpu")


def as_rows(recipe: Recipe, examples: Sequence[Example]) -> list[Row]:
    """`examples` in the tokens of the recipe's base model, supervised as the recipe says.

    Raises
    ------
    InputError
        If an example cannot be trained on, or the model is not one that is trained here (see `shape_of`).
    """
    known = shape_of(recipe.base_model).get_input_embeddings().num_embeddings
    tokenizer = load_tokenizer(recipe.base_model)
    check_special_tokens(recipe, tokenizer)
    rows = tokenize(examples, tokenizer, recipe.sequence_len, not recipe.train_on_inputs)
    for row in rows:
        check_embedded(row.input_ids, known, tokenizer, row.source)
    return rows


def held_out_rows(recipe: Recipe, held_out: Sequence[Example], say: Callable[[str], object] = print) -> list[Row]:
    """The rows that are probed and not trained on: those that the recipe holds out, or else `held_out`.

    Of `held_out`, which may be the kit's own twins, what does not fit the recipe is left out, and `say` is called with
    a line about it.
    """
    if recipe.val_set_size:
        return as_rows(recipe, recipe_examples(recipe)[1])
    rows = []
    for example in held_out:
        try:
            rows += as_rows(recipe, [example])
        except InputError as error:
            say(f"left out: {error}; -p HELD_OUT= takes other rows, or none")
    return rows


def _kept_epochs(recipe: Recipe, wanted: Sequence[int] | None) -> list[int]:
    """The epochs after which adapters are kept, 0 and the last included."""
    epochs = list(recipe.checkpoint_epochs if wanted is None else wanted)
    if not all(type(epoch) is int and 0 <= epoch <= recipe.num_epochs for epoch in epochs):
        raise InputError(f"checkpoint epochs {epochs}: they must lie between 0 and num_epochs = {recipe.num_epochs}")
    return sorted({0, recipe.num_epochs, *epochs})


def train_together(
    trainings: Sequence[Training],
    rows: Sequence[Row],
    checkpoint_epochs: Sequence[int] | None = None,
    fast: bool = True,
    stop: Stop | None = None,
    **options,
) -> None:
    """Train the unfinished `trainings`, in as few passes over the base as memory allows; `options` of `train_pass`."""
    recipe, state = trainings[0].recipe, processes()
    epochs, last = _kept_epochs(recipe, checkpoint_epochs), recipe.num_epochs
    waiting = {training.folder.resolve() for training in trainings if not checkpoints.finished(training)}
    if not waiting:
        for training in trainings if state.is_main_process else ():  # a kill may have come just before this
            checkpoints.strip_older(training, last)
        return
    # If a pass was killed after some of its adapters had written their last checkpoint, all of its adapters resume from
    # their last common one, the finished ones included.
    pending = [t for t in trainings if t.folder.resolve() in waiting or checkpoints.companions(t, last) & waiting]
    longest = max(len(row.input_ids) for row in rows)
    if state.num_processes > 1:
        chosen = Acceleration.off(f"{state.num_processes} processes")
    else:
        chosen = choose(recipe, len(pending), longest, last * len(rows), fast)
    with locked([training.run for training in pending]):
        if state.is_main_process:
            print(f"training: {chosen}")
        passes = checkpoints.plan_passes(pending, chosen.together, state.is_main_process)
        state.wait_for_everyone()  # no process may write before all have read
        for group, start in passes:
            if start == last or (start and stop and stop(group, start)):  # finished, as are all that shared its pass
                continue
            # Free memory may have changed. Compiling must not change: it would change the rounding.
            compiled = checkpoints.compiled(group[0], start) if start and chosen.fused else None
            resumed = chosen if compiled is None else replace(chosen, compiled=compiled)
            if resumed != chosen and state.is_main_process:
                print(f"resuming with the layer {'' if compiled else 'not '}compiled, as it began, for equal bits")
            try:
                train_pass(group, rows, epochs, start, resumed, stop=stop, **options)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                raise RunError(f"memory ran out ({error}); {chosen.remedies(longest)}") from error
