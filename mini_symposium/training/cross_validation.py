"""Held-out loss for anybody's rows: K adapters over one base, each trained without some of the rows.

Each row is measured after every epoch by the adapters that never saw it. All adapters leave out equally many rows, so
that their epochs have equally many steps: where the rows do not divide by K, some rows are left out twice.
"""

import random
from collections.abc import Mapping, Sequence

from mini_symposium.data.dataset import Example, Row, fingerprint
from mini_symposium.errors import InputError
from mini_symposium.evaluation.best_epoch import RECITED, Curve, in_words, load_curves, risen_for_good, save_curves
from mini_symposium.files.writing import discard
from mini_symposium.models.devices import processes
from mini_symposium.recipe import Recipe
from mini_symposium.run import RunDirectory, Training, overwrite_once
from mini_symposium.training.finetune import Stop, as_rows, locked, record_recipe, train_together

FOLDS = 4
"""Adapters of a cross-validation, unless said otherwise."""
LEAST_ROWS = 4


def folds(rows: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """The rows that each of `count` adapters leaves out: equally many for each, every row at least once.

    >>> [len(fold) for fold in folds(13, 4, 42)], len(set().union(*folds(13, 4, 42)))
    ([4, 4, 4, 4], 13)
    >>> folds(4, 4, 42) == folds(4, 4, 42), sorted(folds(4, 4, 42))
    (True, [(0,), (1,), (2,), (3,)])
    """
    shuffled = random.Random(seed).sample(range(rows), rows)
    size = -(-rows // count)
    places = [[(k * size + place) % rows for place in range(size)] for k in range(-(-rows // size))]
    return [tuple(sorted(shuffled[place] for place in some)) for some in places]


def check_rows(rows: Sequence[Row], otherwise: str = "write more") -> None:
    """Refuse rows of which none can be held out; `otherwise` is what to do.

    Raises
    ------
    InputError
        If there are fewer than four, or all are alike.
    """
    if len(rows) < LEAST_ROWS:
        raise InputError(f"{len(rows)} rows: leaving some out takes {LEAST_ROWS} or more; {otherwise}")
    if len({tuple(row.input_ids) for row in rows}) == 1:
        raise InputError(f"all {len(rows)} rows are the same text, so none is held out; {otherwise}")


def cross_validate(
    recipe: Recipe,
    examples: Sequence[Example],
    run: RunDirectory,
    learning_rates: Sequence[float] = (),
    count: int = FOLDS,
    fast: bool = True,
    overwrite: bool = False,
) -> dict[float, Curve]:
    """Cross-validate each learning rate until its held-out loss has risen for good, or for all of the recipe's epochs.

    An interrupted call resumes. Writes the run's curve.json and prints what it recommends.

    Parameters
    ----------
    learning_rates
        The higher one of the recipe's contrast if empty.
    count
        Adapters, each without its share of the rows; as many as there are rows leaves out one at a time.
    fast, overwrite
        Of `train`.

    Returns
    -------
    dict
        Learning rate -> Curve: those of this call, and those that the run had.

    Raises
    ------
    InputError
        If there are fewer than four rows, or all are alike, or `count` is not between 2 and their number; and as
        `train`.
    """
    rows = as_rows(recipe, examples)
    check_rows(rows, "write more, or set FOLDS to 0")
    if not 2 <= count <= len(rows):
        raise InputError(f"FOLDS = {count}: takes a number from 2 to {len(rows)}, the number of rows, or 0 for none")
    if processes().num_processes > 1:
        raise InputError("cross-validation runs in one process; set FOLDS to 0, or start without a launcher")
    rates = list(learning_rates) or [recipe.contrast[0]]
    data, note = fingerprint(examples), run.path / "folds-overwriting.json"
    made_from = {"recipe": recipe.to_yaml(), "dataset_sha256": data}
    if overwrite:
        overwrite_once(note, made_from, lambda: _forget(run))
    curves = load_curves(run)
    for rate in rates:
        left_out = {f"{count}-fold-{k + 1}": fold for k, fold in enumerate(folds(len(rows), count, recipe.seed))}
        curves[rate] = Curve.of(train_without(recipe, rate, rows, left_out, run, data, fast))
        save_curves(run, curves, made_from)
    note.unlink(missing_ok=True)
    print(in_words(curves))
    return curves


def train_without(
    recipe: Recipe,
    learning_rate: float,
    rows: Sequence[Row],
    left_out: Mapping[str, Sequence[int]],
    run: RunDirectory,
    data: str,
    fast: bool,
    last: int = 0,
    items: Sequence[Row] = (),
) -> list[Training]:
    """Train {folder: rows left out} up to epoch `last`, and measure all of them on `items` there; if `last` is 0, up to
    where held-out loss has risen for good."""
    own = recipe.replace(learning_rate=learning_rate)
    trainings = [Training.of(own, run.folds / name, left_out=tuple(some)) for name, some in left_out.items()]
    with locked([training.run for training in trainings]):
        for training in trainings:
            record_recipe(RunDirectory(training.run), recipe, data)
        stop = after(last) if last else risen
        train_together(trainings, rows, [last or recipe.num_epochs], fast, stop, held_out=items)
    return trainings


def stop_rule(text: str, num_epochs: int) -> Stop | None:
    """The rule of `train --stop`: after an epoch, or when all adapters of a pass recite; None if the text is empty or
    "best", which cross-validation decides.

    Raises
    ------
    InputError
        If it is something else, or an epoch beyond the recipe's last.

    >>> rule = stop_rule("6", 10)
    >>> rule([], 5), rule([], 6)
    (False, True)
    """
    if text in ("", "best"):
        return None
    if text == "recite" and processes().num_processes > 1:
        raise InputError("--stop recite: only one process knows what is recited; give an epoch, or no launcher")
    if text == "recite":
        return _recite
    if not text.isdecimal():
        raise InputError(f"--stop {text}: is best, recite, or an epoch")
    if not 0 < (last := int(text)) <= num_epochs:
        raise InputError(f"--stop {text}: takes an epoch from 1 to num_epochs = {num_epochs}")
    return after(last)


def after(last: int) -> Stop:
    """The rule that trainings end after an epoch."""
    return lambda trainings, epoch: epoch >= last


def _recite(trainings: Sequence[Training], epoch: int) -> bool:
    """Whether each adapter's training rows had a mean EM of `RECITED` in the epoch that has just ended."""
    for training in trainings:
        lines = RunDirectory(training.run).metrics(training.learning_rate)
        em = [line["em"] for line in lines if line["epoch"] == epoch - 1]
        if not em or sum(em) / len(em) < RECITED:
            return False
    return True


def _forget(run: RunDirectory) -> None:
    if run.folds.exists():
        discard(run.folds)
    run.curve_file.unlink(missing_ok=True)


def risen(trainings: Sequence[Training], epoch: int) -> bool:
    """Whether the held-out loss of these trainings has risen for good; a `Stop`."""
    return risen_for_good(Curve.of(trainings).loss[: epoch + 1])
