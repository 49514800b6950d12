"""Confidence intervals for few prompts and fewer seeds, and how far apart equal prompt formats look by chance.

A model's answers to one prompt resemble each other, and so do all answers of one seed. So the bootstrap resamples
prompts and seeds, never single answers. It needs two corrections; without them, intervals for a dozen rows and three
seeds are far too narrow:

- The bootstrap underestimates the spread of a small sample: it divides by n where n - 1 is right, and is normal (z)
  where Student's t is right. So the deviations of prompts and of seeds are each widened by t / z * sqrt(n / (n - 1))
  (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 4.1). The factor is 2.7 for three seeds and
  tends to 1 for large n.
- If all values are equal, every resample is equal too. Then the interval is Clopper and Pearson's, for how often a
  different value may occur: after 0 of 60, in less than 6%.

The random generator is seeded: the same values give the same interval.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betaincinv, ndtri, stdtrit

from mini_symposium.errors import InputError

LEVEL = 0.95
"""Confidence level."""
DRAWS = 4000
"""Resamples."""


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval."""

    value: float
    low: float
    high: float
    n: int
    """Number of prompts."""
    seeds: int
    method: str
    """"bootstrap" or "Clopper-Pearson"."""


@dataclass(frozen=True)
class Spread:
    """The best format's mean minus the worst format's, and what it would be by chance if all formats were equal."""

    value: float
    null_mean: float
    """Mean spread of equal formats."""
    null_95: float
    """95th percentile of the spread of equal formats."""
    p: float
    """Probability that equal formats show at least this spread."""
    prompts: int
    formats: int


def clopper_pearson(k: int, n: int) -> Interval:
    """The exact interval of the proportion `k` of `n` (Clopper and Pearson 1934).

    Raises
    ------
    InputError
        If `n` is 0, or `k` is not between 0 and `n`.

    >>> after_none = clopper_pearson(0, 60)
    >>> after_none.low, round(after_none.high, 4)
    (0.0, 0.0596)
    """
    if not 0 <= k <= n or not n:
        raise InputError(f"{k} of {n}: not a proportion; measure at least one")
    tail = (1 - LEVEL) / 2
    low = float(betaincinv(k, n - k + 1, tail)) if k else 0.0
    high = float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0
    return Interval(k / n, low, high, n, 1, "Clopper-Pearson")


def interval(
    values: ArrayLike, bounds: tuple[float, float] | None = (0, 1), draws: int = DRAWS, seed: int = 0
) -> Interval:
    """The mean over prompts and seeds, with its two-stage bootstrap interval.

    Prompts and seeds are crossed: every seed answers every prompt. So a resample is the mean, plus the deviation of the
    resampled prompts (each averaged over seeds), plus that of the resampled seeds (each averaged over prompts). If
    neither prompts nor seeds differ and all is noise, the noise counts twice, and the interval is too wide by a factor
    of at most 1.4. With one seed the interval says nothing about other seeds.

    Parameters
    ----------
    values
        (prompts,) or (prompts, seeds). Further axes are averaged first, as in (prompts, seeds, formats).
    bounds
        Smallest and largest possible value: 0 and 1 for a share; None if there are none, as for a loss.

    Raises
    ------
    InputError
        If there are no values, one is missing or out of bounds, or all are equal and have no bounds.

    >>> rate = interval([True] * 9 + [False] * 3)
    >>> rate.value, rate.method, round(rate.low, 1), round(rate.high, 1)
    (0.75, 'bootstrap', 0.5, 1.0)
    """
    table = _table(values, bounds)
    n, seeds = table.shape
    value = float(table.mean())
    if np.ptp(table) == 0:
        if bounds is None:
            raise InputError(f"all {n} values are {value:g}, so their spread is unknown; give bounds")
        differs = clopper_pearson(0, n).high  # largest share of other values
        low, high = (value + differs * (bound - value) for bound in bounds)
        return Interval(value, float(low), float(high), n, seeds, "Clopper-Pearson")
    generator = np.random.default_rng(seed)
    means = value + sum(_deviations(table.mean(axis), draws, generator) for axis in (1, 0))
    means = means if bounds is None else means.clip(*bounds)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), n, seeds, "bootstrap")


def difference(first: ArrayLike, second: ArrayLike, bounds: tuple[float, float] | None = (0, 1)) -> Interval:
    """The mean of first - second, with its interval as in `interval`.

    Both have the same prompts and the same seeds in the same order, so that their values are compared in pairs.

    Parameters
    ----------
    bounds
        Smallest and largest possible value of `first` and `second`, not of the difference.

    Raises
    ------
    InputError
        As `interval`, or if the two do not have the same shape.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape:
        raise InputError(f"{a.shape} values and {b.shape}: a paired difference needs the same prompts and seeds")
    for values in (a, b):
        _table(values, bounds)
    span = None if bounds is None else (bounds[0] - bounds[1], bounds[1] - bounds[0])
    return interval(a - b, span)


def spread(passed: ArrayLike, draws: int = DRAWS) -> Spread:
    """FormatSpread: the best format's pass rate minus the worst one's (Sclar et al. 2024), with a permutation test.

    If all formats were equal, a prompt's results would be assigned to the formats at random. So the null
    distribution comes from shuffling each prompt's results, which keeps its difficulty.

    Parameters
    ----------
    passed
        (prompts, formats): whether the answer passed, or the share of seeds whose answer did.

    Raises
    ------
    InputError
        If it has another shape, or fewer than two formats.

    >>> spread([[True, False]] * 20).p < 0.001
    True
    """
    table = np.asarray(passed, dtype=float)
    if table.ndim != 2 or not len(table) or table.shape[1] < 2:
        raise InputError(f"{table.shape} values: a spread takes (prompts, formats), two formats or more")
    _table(table, (0, 1))
    generator = np.random.default_rng(0)
    means = np.zeros((draws, table.shape[1]))
    for row in table:
        means += generator.permuted(np.tile(row, (draws, 1)), axis=1)
    null = np.ptp(means / len(table), axis=1)
    value = float(np.ptp(table.mean(0)))
    at_least = int((null >= value - 1e-9).sum())
    p = (at_least + 1) / (draws + 1)
    return Spread(value, float(null.mean()), float(np.quantile(null, 0.95)), p, *table.shape)


def _table(values: ArrayLike, bounds: tuple[float, float] | None) -> np.ndarray:
    """`values` as (prompts, seeds), checked."""
    table = np.asarray(values, dtype=float)
    if not table.size or not table.ndim:
        raise InputError("no values to average; nothing was measured")
    if not np.isfinite(table).all():
        where = [int(i) for i in np.argwhere(~np.isfinite(table))[0]]
        raise InputError(f"no value at {where} (prompt, seed) of {table.shape}; leave the prompt out, or measure it")
    if bounds is not None and (table.min() < bounds[0] - 1e-9 or table.max() > bounds[1] + 1e-9):
        raise InputError(f"values from {table.min():g} to {table.max():g}, beyond {bounds}; give their own bounds")
    return table.reshape(len(table), table.shape[1] if table.ndim > 1 else 1, -1).mean(2)


def _deviations(means: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray | float:
    """(draws,): how far the mean of a resample of `means` lies from their mean, widened as described at the top.

    0 for a single mean.
    """
    n = len(means)
    if n == 1:
        return 0.0
    upper = (1 + LEVEL) / 2
    factor = stdtrit(n - 1, upper) / ndtri(upper) * np.sqrt(n / (n - 1))
    return factor * (means[generator.integers(n, size=(draws, n))].mean(1) - means.mean())
