"""The grid of trainings that the command line asks for, and the parsing of its options.

No torch here, so that a mistyped grid is refused at once.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from mini_symposium.errors import InputError
from mini_symposium.recipe import Recipe
from mini_symposium.run import Training, rate_folder

PER_PASS = 8
"""Adapters of a grid in one pass: more share the cost of the base, fewer leave more passes to run in parallel."""


def experiment(recipe: Recipe, name: str, seed: int, **changes) -> Training:
    """The training called `name` of a changed recipe, in a run directory called NAME-seed-N.

    >>> from mini_symposium.recipe import load_recipe
    >>> experiment(load_recipe("proxy"), "high", 42, learning_rate=1e-4).folder.as_posix()
    'high-seed-42/lr-1e-04'
    """
    return Training.of(recipe.replace(seed=seed, **changes), Path(f"{name}-seed-{seed}"), name)


def grid(
    recipe: Recipe,
    learning_rates: Sequence[float] = (),
    ranks: Sequence[int | tuple[int, int]] = (),
    schedules: Sequence[str] = (),
    seeds: Sequence[int] = (42,),
    epochs: int | None = None,
    per_pass: int = PER_PASS,
) -> list[list[Training]]:
    """Every combination, in passes of at most `per_pass` adapters; what is empty or None is the recipe's own.

    Trainings are sorted by rank, because a pass pads smaller ranks to its largest one.

    Parameters
    ----------
    ranks
        r, with alpha = 2r, or (r, alpha).

    Raises
    ------
    InputError
        If a value is given twice, or no recipe can have it.

    >>> from mini_symposium.recipe import load_recipe
    >>> [[str(t.run) for t in group] for group in grid(load_recipe("proxy"), [1e-3, 1e-4], [4], per_pass=1)]
    [['lr-1e-03-rank-4-alpha-8-constant-seed-42'], ['lr-1e-04-rank-4-alpha-8-constant-seed-42']]
    """
    if per_pass < 1:
        raise InputError(f"--per-pass {per_pass}: takes a whole number above 0")
    pairs = [each if isinstance(each, tuple) else (each, 2 * each) for each in ranks]
    asked = {"learning-rates": learning_rates, "ranks": pairs, "schedules": schedules, "seeds": seeds}
    for option, values in asked.items():
        refuse_repeats(option, values)
    last = recipe.num_epochs if epochs is None else epochs
    trainings = []
    for (r, alpha), rate, rule, seed in product(
        sorted(pairs) or [(recipe.lora_r, recipe.lora_alpha)],
        learning_rates or [recipe.learning_rate],
        schedules or [recipe.lr_scheduler],
        seeds,
    ):
        changes = {"lora_r": r, "lora_alpha": alpha, "lr_scheduler": rule, "learning_rate": rate, "num_epochs": last}
        changed = recipe.replace(**changes)  # refuses bad values before the rate becomes part of a name
        name = f"{rate_folder(rate)}-rank-{r}-alpha-{alpha}-{rule}"
        trainings.append(experiment(changed, name, seed))
    return [trainings[start : start + per_pass] for start in range(0, len(trainings), per_pass)]


def refuse_repeats(option: str, values: Sequence) -> None:
    """Refuse a value that an option has twice: the two would train in one folder."""
    twice = [value for value in dict.fromkeys(values) if list(values).count(value) > 1]
    if twice:
        raise InputError(f"--{option}: {', '.join(map(str, twice))} more than once; give each once")


def parse_numbers(option: str, text: str, kind: type = int) -> list:
    """Comma-separated numbers of an option; [] of an empty text.

    >>> parse_numbers("seeds", "42, 43"), parse_numbers("learning-rates", "1e-3", float)
    ([42, 43], [0.001])
    """
    try:
        return [kind(each) for each in text.split(",")] if text.strip() else []
    except ValueError as error:
        example = "whole numbers, as in 42,43,44" if kind is int else "numbers, as in 1e-3,1e-4"
        raise InputError(f"--{option} {text}: takes {example}") from error


def parse_ranks(text: str) -> list[tuple[int, int]]:
    """Comma-separated r or r:alpha, where alpha is 2r if it is not given.

    >>> parse_ranks("4,64:32")
    [(4, 8), (64, 32)]
    """
    found = []
    for each in text.split(",") if text.strip() else ():
        r, colon, alpha = each.partition(":")
        try:
            found.append((int(r), int(alpha) if colon else 2 * int(r)))
        except ValueError as error:
            raise InputError(f"--ranks {text}: takes r or r:alpha, as in 4,16,64:32") from error
    return found
