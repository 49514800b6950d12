"""When to stop: the held-out curve of a learning rate, its best epoch, and the epoch from which it recites.

The curve comes from cross-validation (see `training.cross_validation`): each row's loss is that of adapters which never
saw it. Held-out loss falls while the model learns what the rows have in common, and rises when it begins to know them
by heart. Rows differ far more from each other than epochs do, so epochs are compared row by row: the standard error of
an epoch is that of the rows' differences from the best epoch.

The recommendation is an epoch, not a dose. The cross-validated adapters see fewer rows than the model will, so one of
the two has to be carried over to more rows, and the epoch changes less. On the proxy at 1e-4 the best epoch was 11, 10
and 8 for adapters trained on 4, 6 and 9 of thirteen rows; the doses were 4.4e-3, 6.0e-3 and 7.2e-3. From 9 rows to 13
the recommended epoch is at most about one too late.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from mini_symposium.errors import InputError
from mini_symposium.evaluation.intervals import DRAWS, LEVEL, widening
from mini_symposium.files.reading import refuse_other_shapes
from mini_symposium.files.writing import write_json
from mini_symposium.run import RunDirectory, Training, read_object

RECITED = 0.9
"""A model recites its training rows if their mean EM is at least this."""
LATER = 1.5
"""For `risen_for_good`, training must have gone on to this many times the best epoch."""
LEAST_LATER = 3
"""For `risen_for_good`, it must also have gone on for this many epochs after the best."""


@dataclass(frozen=True)
class Curve:
    """The cross-validated training of one learning rate; a list has an entry for each epoch, from 0 on.

    Entry e is measured after e epochs: held-out rows just then, training rows over the epoch that follows.
    """

    learning_rate: float
    folds: int
    steps: int
    """Steps of an epoch."""
    loss: list[list[float]]
    """(epochs, rows): held-out loss in nats a token, the mean of the adapters that did not see the row."""
    em: list[list[float]]
    """(epochs, rows): EM of the held-out rows, see `memorization.em_and_es`."""
    trained_loss: list[float]
    """Mean over rows and adapters. It has one entry fewer than `loss`, because no epoch follows the last."""
    trained_em: list[float]

    @classmethod
    def of(cls, trainings: Sequence[Training]) -> "Curve":
        """The curve of trainings that each left out some rows, up to the last epoch that all have reached.

        Raises
        ------
        InputError
            If one of them has no measurement yet.
        """
        runs = [(RunDirectory(training.run), training.learning_rate) for training in trainings]
        own = [[line for line in run.probes(rate) if "example" in line] for run, rate in runs]
        logs = [(probes, run.metrics(rate)) for probes, (run, rate) in zip(own, runs, strict=True)]
        epochs = 1 + min(max((line["epoch"] for line in probes), default=-1) for probes, _ in logs)
        if not epochs:
            raise InputError(f"{trainings[0].run.parent}: no held-out row has been measured yet")
        examples = sorted({line["example"] for probes, _ in logs for line in probes})
        held_out = {key: np.zeros((epochs, len(examples))) for key in ("loss", "em")}
        counts = np.zeros((epochs, len(examples)))
        for probes, _ in logs:
            for line in probes:
                if line["epoch"] < epochs:
                    place = line["epoch"], examples.index(line["example"])
                    counts[place] += 1
                    for key, table in held_out.items():
                        table[place] += line[key]
        trained = {
            key: [
                float(np.mean([line[key] for _, lines in logs for line in lines if line["epoch"] == epoch]))
                for epoch in range(epochs - 1)
            ]
            for key in ("loss", "em")
        }
        loss, em = ((table / counts).round(6).tolist() for table in held_out.values())
        steps = max((line["step"] for line in logs[0][1] if not line["epoch"]), default=0)
        return cls(trainings[0].learning_rate, len(trainings), steps, loss, em, trained["loss"], trained["em"])

    @property
    def means(self) -> np.ndarray:
        """Mean held-out loss by epoch."""
        return np.mean(self.loss, 1)


def save_curves(run: RunDirectory, curves: Mapping[float, Curve], made_from: dict | None = None) -> None:
    """Write the curves into the run's curve.json, with what they recommend.

    `made_from` names their recipe and dataset, see `RunDirectory.clear_training`.
    """
    ordered = [curves[rate] for rate in sorted(curves, reverse=True)]
    recommended = [asdict(recommend(curve)) for curve in ordered]
    content = {"made_from": made_from, "recommended": recommended, "curves": [asdict(curve) for curve in ordered]}
    write_json(run.curve_file, content)


def load_curves(run: RunDirectory) -> dict[float, Curve]:
    """{learning rate: its curve} of a run, highest rate first; {} if none was cross-validated."""
    file = run.curve_file
    if not file.is_file():
        return {}
    with refuse_other_shapes(f"{file}: not curves that this kit wrote", "move it away, and cross-validate again"):
        curves = [Curve(**each) for each in read_object(file)["curves"]]
        for curve in curves:
            recommend(curve)
        return {curve.learning_rate: curve for curve in curves}


def rise(loss: Sequence[Sequence[float]]) -> tuple[int, np.ndarray, np.ndarray]:
    """The best epoch; and by epoch the mean difference from it and the standard error of that difference.

    `loss` is (epochs, rows).
    """
    table = np.asarray(loss, dtype=float)
    best = int(table.mean(1).argmin())
    apart = table - table[best]
    return best, apart.mean(1), apart.std(1, ddof=1) / np.sqrt(table.shape[1])


def risen_for_good(loss: Sequence[Sequence[float]]) -> bool:
    """Whether held-out loss, (epochs, rows), is past its best, so that more epochs would show nothing new.

    Training must have gone on long enough after the best epoch (LATER, LEAST_LATER), and the last two epochs must each
    be worse than the best by more than two standard errors.

    >>> falling = [[4.0 - 0.1 * epoch + row for row in (0, 1, 3)] for epoch in range(10)]
    >>> risen_for_good(falling), risen_for_good([*falling, *falling[::-1]])
    (False, True)
    """
    best, apart, error = rise(loss)
    last = len(apart) - 1
    return last >= max(LATER * best, best + LEAST_LATER) and bool((apart[-2:] > 2 * error[-2:]).all())


@dataclass(frozen=True)
class Recommendation:
    """Where to stop at one learning rate."""

    learning_rate: float
    epoch: int
    """The epoch with the lowest mean held-out loss."""
    first: int
    last: int
    """Around it, the epochs that are worse by at most one standard error."""
    loss: float
    recites_from: int | None
    """The first epoch after which the training rows' mean EM is at least `RECITED`; None if it never is."""
    turned: bool
    """Whether the curve has a best epoch before its end; if not, the best may lie later."""

    def __str__(self) -> str:
        window = f" ({self.first} to {self.last})" if self.last > self.first else ""
        rate = f"{self.learning_rate:g}"
        recites = f"; it recites from epoch {self.recites_from} on" if self.recites_from is not None else ""
        if not self.turned:
            return f"at {rate} held-out loss is best at the last epoch measured, {self.epoch}: train longer{recites}"
        if not self.epoch:
            never = "held-out loss never falls below its start: what these rows teach does not carry over"
            return f"at {rate} {never}{recites}"
        return f"take epoch {self.epoch}{window} of {rate}{recites}"


def recommend(curve: Curve, metrics: Sequence[Mapping] = ()) -> Recommendation:
    """The epoch to take, by the lowest mean held-out loss, with those within one standard error of it.

    Parameters
    ----------
    metrics
        Lines of the metrics.jsonl of a training on all rows at this rate, which tell from which epoch it recites.
        Without them, the curve's own training EM tells, up to its last epoch.

    >>> loss = [[4.0 + (epoch - 3) ** 2 / 9 + row for row in (0, 1, 3)] for epoch in range(8)]
    >>> em = [[0.5] * 3] * 8
    >>> curve = Curve(1e-4, 3, 2, loss, em, [3.0] * 7, [0.2, 0.3, 0.4, 0.5, 0.8, 0.92, 0.97])
    >>> str(recommend(curve))
    'take epoch 3 of 0.0001; it recites from epoch 5 on'
    """
    best, apart, error = rise(curve.loss)
    within = apart <= error
    first = last = best
    while first and within[first - 1]:
        first -= 1
    while last + 1 < len(within) and within[last + 1]:
        last += 1
    known: dict[int, list[float]] = {}
    for line in metrics:
        known.setdefault(line["epoch"], []).append(line["em"])
    by_epoch = [float(np.mean(each)) for each in known.values()] or curve.trained_em
    recites = next((epoch for epoch, em in enumerate(by_epoch) if em >= RECITED), None)
    return Recommendation(
        curve.learning_rate, best, first, last, float(curve.means[best]), recites, best < len(apart) - 1
    )


def better_at_best(low: Curve, high: Curve, seed: int = 0) -> tuple[float, float, float]:
    """The low rate's best held-out loss minus the high rate's, and its confidence interval over rows, in nats a token.

    Rows are resampled, and both best epochs are chosen anew in each resample. The deviations of the resamples are
    widened, see `intervals.widening`.

    Raises
    ------
    InputError
        If the curves are of different rows.
    """
    tables = [np.asarray(curve.loss) for curve in (low, high)]
    rows = tables[0].shape[1]
    if tables[1].shape[1] != rows:
        raise InputError(f"curves of {rows} and {tables[1].shape[1]} rows; compare curves of the same rows")
    value = float(np.subtract(*(table.mean(1).min() for table in tables)))
    drawn = np.random.default_rng(seed).integers(rows, size=(DRAWS, rows))
    bests = [table[:, drawn].mean(2).min(0) for table in tables]
    wider = widening(rows)
    low_end, high_end = np.quantile((bests[0] - bests[1] - value) * wider, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return value, value + float(low_end), value + float(high_end)


def in_words(curves: Mapping[float, Curve], metrics: Mapping[float, Sequence[Mapping]] | None = None) -> str:
    """The recommendation of each rate; and of two rates, whether the low one's best is better than the high one's.

    `metrics` are those of `recommend`, by learning rate.
    """
    found = {rate: recommend(curve, (metrics or {}).get(rate, ())) for rate, curve in curves.items()}
    lines = [str(found[rate]) for rate in sorted(found, reverse=True)]
    turned = sorted(rate for rate in found if found[rate].turned)
    if len(turned) > 1:
        low, high = turned[0], turned[-1]
        value, least, most = better_at_best(curves[low], curves[high])
        if least <= 0 <= most:
            verdict = f"the best of {low:g} and of {high:g} cannot be told apart"
        else:
            verdict = f"the best of {low:g} is {'better' if value < 0 else 'worse'} than that of {high:g}"
        widths = [found[rate].last - found[rate].first + 1 for rate in (low, high)]
        lines.append(
            f"{verdict}: {value:+.3f} nats a token, 95% interval {least:+.3f} to {most:+.3f}; "
            f"the good window is {widths[0]} epochs wide at {low:g}, {widths[1]} at {high:g}"
        )
    return "\n".join(lines)
