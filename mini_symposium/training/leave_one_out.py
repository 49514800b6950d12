"""What each example teaches, by exact retraining: for every row an adapter that is trained without it."""

import random
from collections.abc import Sequence
from dataclasses import replace

from mini_symposium.data.dataset import Example, Row, fingerprint
from mini_symposium.errors import InputError
from mini_symposium.evaluation.best_epoch import Curve, load_curves, recommend, rise
from mini_symposium.evaluation.influence import Influence, load_influence, save_influence
from mini_symposium.files.writing import discard
from mini_symposium.recipe import Recipe
from mini_symposium.run import RunDirectory, Training
from mini_symposium.training.cross_validation import check_rows, cross_validate, train_without
from mini_symposium.training.finetune import as_rows, held_out_rows

PARTS = 4
"""Adapters of each number of rows in the learning curve."""


def leave_one_out(
    recipe: Recipe,
    examples: Sequence[Example],
    run: RunDirectory,
    learning_rate: float = 0.0,
    epoch: int = 0,
    seeds: int = 2,
    held_out: Sequence[Example] = (),
    fast: bool = True,
    overwrite: bool = False,
) -> Influence:
    """Train an adapter without each row, and measure all of them on all rows; an interrupted call resumes.

    Writes the run's influence.json and influence.csv. A later call with more seeds adds to them.

    Parameters
    ----------
    learning_rate
        The higher one of the recipe's contrast if 0.
    epoch
        At which all are measured; the best one by cross-validation if 0, which is done first if the run has none.
    seeds
        How many, from the recipe's on. From two on the noise is known.
    held_out
        Rows that are measured and not trained on, such as twins of the rows.
    fast
        Of `train`.
    overwrite
        Forget what was measured with another recipe, dataset, rate or epoch.

    Raises
    ------
    InputError
        If there are fewer than four rows, or all are alike; if no epoch lowers held-out loss; if the run was measured
        otherwise before; and as `train`.
    """
    rows, apart = as_rows(recipe, examples), held_out_rows(recipe, held_out)
    check_rows(rows)
    if seeds < 1:
        raise InputError(f"seeds = {seeds}: takes 1 or more")
    rate = learning_rate or recipe.contrast[0]
    curves = load_curves(run)
    if rate not in curves:
        curves = cross_validate(recipe, examples, run, [rate], fast=fast)
    last = epoch or recommend(curves[rate]).epoch
    if not 0 < last <= recipe.num_epochs:
        raise InputError(
            f"epoch {last} of {rate:g}: takes 1 to {recipe.num_epochs}; if no epoch lowers held-out loss, give one"
        )
    data = fingerprint(examples)
    made_from = {"recipe": recipe.to_yaml(), "dataset_sha256": data, "held_out_sha256": fingerprint(held_out)}
    found = Influence(
        recipe.scale, rate, last, made_from, [each.query for each in examples], [row.source for row in apart]
    )
    begun = load_influence(run)
    if begun and begun.measured_as == found.measured_as:
        found = begun
    elif begun and not overwrite:
        raise InputError(
            f"{run.influence_file}: of epoch {begun.epoch} of {begun.learning_rate:g}, or of another recipe, dataset "
            "or held-out rows; pass --overwrite to measure again"
        )
    if overwrite and found is not begun:  # adapters of an interrupted call, perhaps of other rows
        for folder in (*run.folds.glob("without-*"), *run.folds.glob("*-rows-*")):
            discard(folder)
    high = recipe.replace(learning_rate=rate)
    for seed in range(recipe.seed + len(found.seeds), recipe.seed + seeds):
        without = {f"without-{k + 1}-seed-{seed}-epoch-{last}": (k,) for k in range(len(rows))}
        trainings = train_without(high.replace(seed=seed), rate, rows, without, run, data, fast, last, [*rows, *apart])
        own = Curve.of(trainings)
        found = replace(
            found,
            base=own.loss[0],
            seeds=[*found.seeds, seed],
            loss=[*found.loss, [_losses(training, last) for training in trainings]],
            learning=found.learning or _learning_curve(high, rows, run, data, fast, [curves[rate], own]),
        )
        save_influence(run, found)
        for training in trainings:  # two gigabytes for the proxy's thirteen rows
            discard(training.run)
    return found


def _losses(training: Training, epoch: int) -> list[float]:
    """What a training measured of the items after an epoch."""
    lines = RunDirectory(training.run).probes(training.learning_rate)
    found = {line["item"]: line["loss"] for line in lines if line["epoch"] == epoch and "item" in line}
    return [found[item] for item in sorted(found)]


def _learning_curve(
    recipe: Recipe, rows: Sequence[Row], run: RunDirectory, data: str, fast: bool, curves: Sequence[Curve]
) -> dict[str, list[float]]:
    """{rows trained on: each row's held-out loss at the best epoch}: of `curves`, and for about a third and half of the
    rows."""
    count = len(rows)
    found = {count - -(-count // curve.folds): _best(curve) for curve in curves}
    shuffled = random.Random(recipe.seed).sample(range(count), count)
    starts = [k * count // PARTS for k in range(PARTS)]
    for fewer in {max(2, round(count / 3)), round(count / 2)} - {*found}:
        parts = {
            f"{fewer}-rows-{k + 1}": sorted(shuffled[(start + place) % count] for place in range(count - fewer))
            for k, start in enumerate(starts)
        }
        found[fewer] = _best(Curve.of(train_without(recipe, recipe.learning_rate, rows, parts, run, data, fast)))
    return {str(trained_on): found[trained_on] for trained_on in sorted(found)}


def _best(curve: Curve) -> list[float]:
    return curve.loss[rise(curve.loss)[0]]
