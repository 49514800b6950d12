"""Intervals and tests for few prompts and fewer seeds, and how far apart equal prompt formats look by chance.

A model's answers to one prompt resemble each other, and so do all answers of one seed. So prompts and seeds are the
samples, never single answers: the variance of a mean is that of the prompts' means plus that of the seeds' means.

- A share, or a difference of shares, has a smallest and a largest possible value. Its prompts are weighted at random
  (Dirichlet), with one more prompt of the worst possible value: Gaffke's bound for a bounded mean (2005; Learned-Miller
  and Thomas 2019, arXiv 1905.06208). For yes and no it is exactly Clopper and Pearson's: after 0 of 60, less than 6%.
  That it covers other values as often as it claims is a conjecture; nobody has refuted it, and the tests try to.
  The weights do not depend on the values, so a prompt that does better never lowers an end of the interval.
- A measure without bounds, such as a loss, has Student's t over prompts.
- Seeds add their variance; the degrees of freedom are Welch's and Satterthwaite's. With one seed nothing is said about
  other seeds.

An end of an interval is the threshold at which the one-sided test gives p = (1 - level) / 2. So interval and p-value
cannot disagree.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import ndtri, stdtr, stdtrit

from mini_symposium.errors import InputError

LEVEL = 0.95
"""Confidence level."""
DRAWS = 4000
"""Resamples."""
POWER = 0.8
"""Probability with which `needed` wants the effect to be found."""
MOST = 1000, (3, 5, 8, 12)
"""The most prompts, and the numbers of seeds, that `needed` tries."""
_STEP = 0.05
_GRID = np.exp(np.arange(-22, 20, _STEP))[:, None]

Bounds = tuple[float, float] | None


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval."""

    value: float
    low: float
    high: float
    n: int
    """Number of prompts."""
    seeds: int


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


def interval(values: ArrayLike, bounds: Bounds = (0, 1), level: float = LEVEL) -> Interval:
    """The mean over prompts and seeds, with its interval as described at the top.

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

    >>> after_none = interval([0] * 60)
    >>> after_none.low, round(after_none.high, 4)
    (0.0, 0.0596)
    """
    table = as_table(values, bounds)
    value = float(table.mean())
    low = _end(table, bounds, (1 - level) / 2)
    mirrored, _, turned = _mirrored(table, 0, bounds)
    high = -_end(mirrored, turned, (1 - level) / 2)
    return Interval(value, min(low, value), max(high, value), *table.shape)


def difference(first: ArrayLike, second: ArrayLike, bounds: Bounds = (0, 1)) -> Interval:
    """The mean of first - second, with its interval as in `interval`.

    Parameters
    ----------
    bounds
        Smallest and largest possible value of `first` and `second`, not of the difference.

    Raises
    ------
    InputError
        As `interval` and `paired`.
    """
    return interval(paired(first, second), bounds and (bounds[0] - bounds[1], bounds[1] - bounds[0]))


def paired(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    """first - second, of the same prompts and the same seeds in the same order; InputError if their shapes differ."""
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape:
        raise InputError(f"{a.shape} values and {b.shape}: a paired difference needs the same prompts and seeds")
    return a - b


def p_value(values: ArrayLike, threshold: float, bounds: Bounds = (0, 1)) -> float:
    """Two-sided p-value: twice the probability of a mean at least this far from `threshold`, on the same side, if the
    true mean is `threshold`.

    Raises
    ------
    InputError
        As `interval`.

    >>> round(p_value([1] * 13, 0.6), 4)  # 2 x 0.6 ** 13
    0.0026
    """
    table = as_table(values, bounds)
    both = _above(table, threshold, bounds), _above(*_mirrored(table, threshold, bounds))
    return min(1.0, 2 * min(both))


def needed(values: ArrayLike, threshold: float, bounds: Bounds, alpha: float) -> tuple[int, int] | None:
    """The prompts and seeds with which values like these would be told from `threshold`, with probability POWER.

    It assumes that the true effect and variances are the measured ones. Noise of single answers averages out over more
    prompts; differences between seeds do not. Seeds are added only where no number of prompts is enough.

    Parameters
    ----------
    alpha
        Two-sided p-value below which the effect counts as found.

    Returns
    -------
    tuple or None
        (prompts, seeds); None beyond MOST, as for an effect that lies on the threshold.

    >>> needed([0] * 60, 0.05, (0, 1), 0.05)
    (72, 3)
    """
    table = as_table(values, bounds)
    if table.mean() < threshold:
        table, threshold, bounds = _mirrored(table, threshold, bounds)
    most, choices = MOST
    of_prompts, of_seeds = (_variance(table.mean(axis)) for axis in (1, 0))
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    noise = float((rest**2).sum()) / max(1, (table.shape[0] - 1) * (table.shape[1] - 1))

    def found(n: int, seeds: int) -> bool:
        added = (max(0.0, of_seeds - noise / len(table)) + noise / n) / seeds
        missed = ndtri(POWER) * math.sqrt(of_prompts / n + added)
        return _above(table, threshold + missed, bounds, (n, seeds, added)) <= alpha / 2

    for seeds in (each for each in choices if each >= table.shape[1] or each == choices[-1]):
        if found(most, seeds):
            low, high = 1, most  # found at the high end, not at the low one
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if found(middle, seeds) else (middle, high)
            return high, seeds
    return None


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
    as_table(table, (0, 1))
    generator = np.random.default_rng(0)
    means = np.zeros((draws, table.shape[1]))
    for row in table:
        means += generator.permuted(np.tile(row, (draws, 1)), axis=1)
    null = np.ptp(means / len(table), axis=1)
    value = float(np.ptp(table.mean(0)))
    at_least = int((null >= value - 1e-9).sum())
    p = (at_least + 1) / (draws + 1)
    return Spread(value, float(null.mean()), float(np.quantile(null, 0.95)), p, *table.shape)


def as_table(values: ArrayLike, bounds: Bounds) -> np.ndarray:
    """`values` as (prompts, seeds), checked as `interval` says."""
    table = np.asarray(values, dtype=float)
    if not table.size or not table.ndim:
        raise InputError("no values to average; nothing was measured")
    if not np.isfinite(table).all():
        where = [int(i) for i in np.argwhere(~np.isfinite(table))[0]]
        raise InputError(f"no value at {where} (prompt, seed) of {table.shape}; leave the prompt out, or measure it")
    if bounds is not None and (table.min() < bounds[0] - 1e-9 or table.max() > bounds[1] + 1e-9):
        raise InputError(f"values from {table.min():g} to {table.max():g}, beyond {bounds}; give their own bounds")
    table = table.reshape(len(table), table.shape[1] if table.ndim > 1 else 1, -1).mean(2)
    if bounds is None and np.ptp(table) == 0:
        raise InputError(f"all {len(table)} values are {table.mean():g}, so their spread is unknown; give bounds")
    return table


def _mirrored(table: np.ndarray, threshold: float, bounds: Bounds) -> tuple[np.ndarray, float, Bounds]:
    """The values, threshold and bounds with their signs changed: below the threshold becomes above it."""
    return -table, -threshold, bounds and (-bounds[1], -bounds[0])


def _above(table: np.ndarray, threshold: float, bounds: Bounds, instead: tuple[int, int, float] | None = None) -> float:
    """One-sided p-value: the probability of a mean as high as that of the (prompts, seeds) `table`, if the true mean is
    `threshold`.

    `instead` is (prompts, seeds, squared standard error from the seeds): the table's mean and its prompts' variance are
    then taken as if they came from so many prompts and seeds.
    """
    n, seeds, added = instead or (*table.shape, _variance(table.mean(0)) / table.shape[1])
    gap, of_prompts = table.mean() - threshold, table.mean(1)
    if bounds is None:
        own, freedom = _variance(of_prompts) / n, n - 1
        if gap <= 0:
            return 1.0
    else:
        p = _below(of_prompts, threshold, bounds[0], n / len(of_prompts))
        if p >= 0.5 or not added:
            return p
        own, freedom = (gap / ndtri(p)) ** 2, math.inf
    of_both = (own + added) ** 2 / (own**2 / max(freedom, 1) + added**2 / max(seeds - 1, 1)) if own + added else 1
    return float(stdtr(of_both, -gap / math.sqrt(own + added))) if own + added else 0.0


def _below(values: np.ndarray, threshold: float, worst: float, times: float) -> float:
    """The probability that a randomly weighted mean of `values`, each taken `times` times, and `worst` is below
    `threshold`.

    Dirichlet weights are exponential variables divided by their sum. So the mean is below the threshold if the sum of
    exponential x (value - threshold) is negative. The probability of that is Gil-Pelaez's integral over the sum's
    characteristic function, here in steps of log t.
    """
    distinct, counts = np.unique(values, return_counts=True)
    away = np.append(distinct, worst) - threshold  # (distinct + 1,)
    counts = np.append(counts * times, 1.0)
    if not (scale := math.sqrt(float(counts @ away**2))):
        return 1.0
    at = _GRID * (away / scale)  # (grid, distinct + 1)
    size = np.exp(-0.5 * (np.log1p(at * at) @ counts))
    return float(np.clip(0.5 - (size * np.sin(np.arctan(at) @ counts)).sum() * _STEP / np.pi, 0, 1))


def _end(table: np.ndarray, bounds: Bounds, tail: float) -> float:
    """The lower end of the interval of a (prompts, seeds) table: the threshold at which `_above` is `tail`."""
    value = float(table.mean())
    if bounds is None:
        span = float(sum(math.sqrt(_variance(table.mean(axis))) for axis in (1, 0)))
        lowest = value - span * float(abs(stdtrit(1, tail)))
    else:
        lowest = float(bounds[0])
    if value <= lowest or _above(table, lowest, bounds) >= tail:
        return lowest
    return float(brentq(lambda at: _above(table, at, bounds) - tail, lowest, value, xtol=1e-9))


def _variance(means: np.ndarray) -> float:
    """The sample variance; 0 for a single mean."""
    return float(means.var(ddof=1)) if len(means) > 1 else 0.0


def widening(n: int) -> float:
    """By how much the deviations of a bootstrap over `n` values must be widened: t / z * sqrt(n / (n - 1)).

    The bootstrap divides by n where n - 1 is right, and its tails are normal (z) where Student's t is right
    (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 4.1).
    """
    upper = (1 + LEVEL) / 2
    return float(stdtrit(n - 1, upper) / ndtri(upper) * np.sqrt(n / (n - 1)))
