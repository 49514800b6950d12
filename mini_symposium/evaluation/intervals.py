"""Intervals for what few prompts and fewer seeds can tell, and how far apart equal formats look by chance.

A model's answers to one prompt resemble each other, and so do a seed's answers to all prompts. So prompts are drawn
again with replacement, then seeds; never single answers. Two corrections, without which intervals of a dozen rows and
three seeds are far too narrow or no intervals at all:

- The bootstrap treats n draws as if they were everything, so its spread is that of a sample's own, z for t and n for
  n - 1. Each stage's deviations are widened by t / z * sqrt(n / (n - 1)) (Hesterberg 2015, "What Teachers Should Know
  About the Bootstrap", section 4.1). With n this tends to 1; with three seeds it is 2.7.
- Where all values are the same, nothing can be drawn that differs. Then the interval is Clopper and Pearson's for how
  often another value may come: 0 of 60 means "under 6%".

Draws are seeded: the same values give the same interval.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betaincinv, ndtri, stdtrit

from mini_symposium.errors import InputError

LEVEL = 0.95
DRAWS = 4000


@dataclass(frozen=True)
class Interval:
    """A mean and where it may lie; `n` counts prompts, `seeds` seeds, `method` is "bootstrap" or "Clopper-Pearson"."""

    value: float
    low: float
    high: float
    n: int
    seeds: int
    method: str


@dataclass(frozen=True)
class Spread:
    """Best format's mean minus the worst one's, beside what formats that are all equal show.

    `p` is the probability that equal formats show at least this much.
    """

    value: float
    null_mean: float
    null_95: float
    p: float
    prompts: int
    formats: int


def clopper_pearson(k: int, n: int, level: float = LEVEL) -> Interval:
    """The exact interval of a proportion, `k` of `n` (Clopper and Pearson 1934).

    Raises
    ------
    InputError
        If `k` of `n` is no proportion.

    >>> found = clopper_pearson(0, 60)
    >>> found.low, round(found.high, 4)
    (0.0, 0.0596)
    """
    if not 0 <= k <= n or not n:
        raise InputError(f"{k} of {n}: no proportion; at least one must have been measured")
    tail = (1 - level) / 2
    low = float(betaincinv(k, n - k + 1, tail)) if k else 0.0
    high = float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0
    return Interval(k / n, low, high, n, 1, "Clopper-Pearson")


def interval(
    values: ArrayLike,
    bounds: tuple[float, float] | None = (0, 1),
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """The mean over prompts and seeds, and its two-stage bootstrap interval.

    Prompts and seeds are crossed, every seed answering every prompt, so a draw is the mean, plus the deviation of the
    prompts drawn (each averaged over seeds), plus that of the seeds drawn (each averaged over prompts). Where neither
    matters and all is noise, the noise counts twice and the interval is too wide, by 1.4 at most. With one seed the
    interval says nothing about another one.

    Parameters
    ----------
    values
        (prompts,), (prompts, seeds), or with more axes, which are averaged first, as (prompts, seeds, formats).
    bounds
        Least and largest possible value: 0 and 1 for a share. None, for a loss, if there is no such thing.

    Raises
    ------
    InputError
        If there are none, one is missing or out of bounds, or all are equal and have no bounds.

    >>> found = interval([True] * 9 + [False] * 3)
    >>> found.value, found.method, round(found.low, 1), round(found.high, 1)
    (0.75, 'bootstrap', 0.5, 1.0)
    """
    table = _table(values, bounds)
    n, seeds = table.shape
    value = float(table.mean())
    if np.ptp(table) == 0:
        if bounds is None:
            raise InputError(f"all {n} values are {value:g}, so there is no telling how far others lie; give bounds")
        differs = clopper_pearson(0, n, level).high  # how often another value may come, at most
        low, high = (value + differs * (bound - value) for bound in bounds)
        return Interval(value, float(low), float(high), n, seeds, "Clopper-Pearson")
    generator = np.random.default_rng(seed)
    drawn = value + sum(_deviations(table.mean(axis), level, draws, generator) for axis in (1, 0))
    drawn = drawn if bounds is None else drawn.clip(*bounds)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), n, seeds, "bootstrap")


def difference(
    first: ArrayLike,
    second: ArrayLike,
    bounds: tuple[float, float] | None = (0, 1),
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """The mean of first - second, paired: the same prompts, and the same seeds, in the same order. See `interval`.

    Parameters
    ----------
    bounds
        Those of the values; the difference has its own.

    Raises
    ------
    InputError
        As `interval`, or if the two do not have the same shape.
    """
    one, other = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if one.shape != other.shape:
        raise InputError(f"{one.shape} values and {other.shape}: a paired difference needs the same prompts and seeds")
    for values in (one, other):
        _table(values, bounds)
    span = None if bounds is None else (bounds[0] - bounds[1], bounds[1] - bounds[0])
    return interval(one - other, span, level, draws, seed)


def spread(passed: ArrayLike, draws: int = DRAWS, seed: int = 0) -> Spread:
    """FormatSpread, max - min over formats of the pass rate (Sclar et al. 2024), with its permutation null.

    Were all formats the same, which of a prompt's results stands under which format would be chance; so the null
    shuffles each row. It keeps how hard each prompt is.

    Parameters
    ----------
    passed
        (prompts, formats): whether the answer passed, or at which rate over seeds.

    Raises
    ------
    InputError
        If it is no such table, or has fewer than two formats.

    >>> spread([[True, False]] * 20).p < 0.001
    True
    """
    table = np.asarray(passed, dtype=float)
    if table.ndim != 2 or not len(table) or table.shape[1] < 2:
        raise InputError(f"{table.shape} values: a spread takes (prompts, formats), two formats or more")
    _table(table, (0, 1))
    generator = np.random.default_rng(seed)
    means = np.zeros((draws, table.shape[1]))
    for row in table:
        means += generator.permuted(np.tile(row, (draws, 1)), axis=1)
    null = np.ptp(means / len(table), axis=1)
    found = float(np.ptp(table.mean(0)))
    at_least = int((null >= found - 1e-9).sum())
    p = (at_least + 1) / (draws + 1)
    return Spread(found, float(null.mean()), float(np.quantile(null, 0.95)), p, *table.shape)


def _table(values: ArrayLike, bounds: tuple[float, float] | None) -> np.ndarray:
    """(prompts, seeds), checked."""
    table = np.asarray(values, dtype=float)
    if not table.size or not table.ndim:
        raise InputError("no values to average; nothing was measured")
    if not np.isfinite(table).all():
        where = [int(i) for i in np.argwhere(~np.isfinite(table))[0]]
        raise InputError(f"no value at {where} (prompt, seed) of {table.shape}; leave the prompt out, or measure it")
    if bounds is not None and (table.min() < bounds[0] - 1e-9 or table.max() > bounds[1] + 1e-9):
        raise InputError(f"values from {table.min():g} to {table.max():g}, beyond {bounds}; give their own bounds")
    return table.reshape(len(table), table.shape[1] if table.ndim > 1 else 1, -1).mean(2)


def _deviations(means: np.ndarray, level: float, draws: int, generator: np.random.Generator) -> np.ndarray | float:
    """Of the mean of as many draws from `means`, (draws,), widened for their number; 0 where there is but one."""
    n = len(means)
    if n == 1:
        return 0.0
    upper = (1 + level) / 2
    wider = stdtrit(n - 1, upper) / ndtri(upper) * np.sqrt(n / (n - 1))
    return wider * (means[generator.integers(n, size=(draws, n))].mean(1) - means.mean())
