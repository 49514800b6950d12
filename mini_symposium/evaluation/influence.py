"""What each example teaches: how leaving it out changes the loss on the others.

The numbers come from exact retraining (see `training.leave_one_out`), not from an approximation: for every row an
adapter is trained without it, all at the same dose. A row's influence on another is the loss of the other one without
it, minus the median of its loss under the adapters that leave out some other row. So all adapters that are compared
have seen the other row equally often. An influence tells whether a row matters more or less than most rows do.
`carried` tells whether rows teach each other at all: what the adapter that never saw a row knows of it, it has learned
from the others.

Training with other seeds shows how much of this is noise.
"""

from dataclasses import asdict, dataclass, field

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from mini_symposium.evaluation.intervals import LEVEL
from mini_symposium.files.reading import refuse_other_shapes
from mini_symposium.files.writing import write_json, written_whole
from mini_symposium.run import RunDirectory, read_object

REDUNDANT = 0.8
"""A row is redundant if `carried` is at least this."""
ALONE = 0.1
"""A row stands alone if `carried` is at most this, and leaving it out changes no other row's loss beyond the noise."""


@dataclass(frozen=True)
class Influence:
    """The losses of leave-one-out training, in nats a token. Items are the rows, then rows that no adapter saw."""

    scale: str
    learning_rate: float
    epoch: int
    made_from: dict
    rows: list[str]
    """Each row's query."""
    held_out: list[str]
    """File and line of each row that no adapter was trained on."""
    base: list[float] = field(default_factory=list)
    """(rows,): before training."""
    seeds: list[int] = field(default_factory=list)
    loss: list[list[list[float]]] = field(default_factory=list)
    """(seeds, rows, items): under the adapter of that seed which left out that row."""
    learning: dict[str, list[float]] = field(default_factory=dict)
    """{rows trained on: (rows,), the held-out loss of each row at the best epoch}"""

    @property
    def measured_as(self) -> tuple:
        """What two measurements must have in common to be joined."""
        return self.made_from, self.learning_rate, self.epoch

    @property
    def by_seed(self) -> np.ndarray:
        """(seeds, rows, items): the influence of leaving out each row on each item; nan of a row on itself."""
        loss, n = np.asarray(self.loss), len(self.rows)
        loss[:, range(n), range(n)] = np.nan  # this adapter never saw the row
        others = [np.nanmedian(np.delete(loss, i, 1), 1) for i in range(n)]
        return loss - np.stack(others, 1)

    @property
    def carried(self) -> np.ndarray:
        """(rows,): what the others teach about each row, as a share of what is learned of it when it is there too."""
        n = len(self.rows)
        loss, base = np.asarray(self.loss).mean(0)[:, :n], np.asarray(self.base)
        unseen = loss.diagonal().copy()
        np.fill_diagonal(loss, np.nan)
        return (base - unseen) / (base - np.nanmedian(loss, 0))

    def table(self) -> pd.DataFrame:
        """A line for each trained adapter and item: seed, left_out, item, held_out, loss, influence."""
        lines = [
            (seed, i, j, j >= len(self.rows), self.loss[s][i][j], self.by_seed[s, i, j])
            for s, seed in enumerate(self.seeds)
            for i in range(len(self.rows))
            for j in range(len(self.rows) + len(self.held_out))
        ]
        return pd.DataFrame(lines, columns=["seed", "left_out", "item", "held_out", "loss", "influence"])

    def summary(self) -> pd.DataFrame:
        """A line for each row: its query, `teaches` (its mean influence on the other rows), the same on held-out rows,
        `carried`, and a verdict: teaches (on average, or one row), harms (on average), conflicts (with one row),
        redundant, stands alone, or nothing.

        What is below `noise` gets no verdict; with one seed only `redundant` can be told.
        """
        n, influence = len(self.rows), self.by_seed.mean(0)
        on_rows = np.nanmean(influence[:, :n], 1)
        on_held_out = influence[:, n:].mean(1) if self.held_out else np.full(n, np.nan)
        least_row, least_cell = self.noise()[0], self.noise()[1][:n]
        verdicts = []
        for i in range(n):
            cells = np.nan_to_num(influence[i, :n])
            harms, conflicts = on_rows[i] < -least_row, (cells < -least_cell).any()
            teaches = on_rows[i] > least_row or (cells > least_cell).any()
            redundant = self.carried[i] >= REDUNDANT
            alone = self.carried[i] <= ALONE and not (harms or conflicts or teaches) and len(self.seeds) > 1
            known = {"redundant": redundant, "harms": harms, "conflicts": conflicts, "teaches": teaches}
            verdicts.append(", ".join(word for word, holds in (known | {"stands alone": alone}).items() if holds))
        columns = {"query": self.rows, "teaches": on_rows, "on held-out rows": on_held_out, "carried": self.carried}
        return pd.DataFrame({**columns, "verdict": verdicts})

    def noise(self) -> tuple[float, np.ndarray]:
        """What a row's mean influence, and a single influence on each item, (items,), must exceed to get a verdict.

        The limits come from the spread between seeds, pooled over the rows that were left out, by Student's t with
        Bonferroni's correction. If no row had any influence, at most one dataset in twenty would get a verdict. The
        limits are infinite with one seed.
        """
        seeds, n, found = len(self.seeds), len(self.rows), self.by_seed
        if seeds < 2:
            return np.inf, np.full(found.shape[2], np.inf)
        limits = []
        for values, comparisons in ((np.nanmean(found[:, :, :n], 2), n), (found, n * (n - 1))):
            deviation = np.sqrt(np.nanmean(values.var(0, ddof=1), 0))
            tail = (1 - LEVEL) / 4 / comparisons
            limits.append(deviation / np.sqrt(seeds) * stdtrit((n - 1) * (seeds - 1), 1 - tail))
        return limits[0], limits[1]

    def more_rows(self) -> tuple[float, float]:
        """By how much twice as many rows lower the best held-out loss, and the standard error over rows.

        For each row, a straight line is fitted to its loss over log2 of the number of rows.
        """
        at = np.log2([int(count) for count in self.learning])
        slopes = -np.polyfit(at, np.asarray(list(self.learning.values())), 1)[0]
        return float(slopes.mean()), float(slopes.std(ddof=1) / np.sqrt(len(slopes)))

    def in_words(self, width: int = 40) -> str:
        """The findings, one in a line, with names of rows."""
        n, found, lines = len(self.rows), self.summary(), []
        least_row, least_cell = self.noise()
        influence = self.by_seed.mean(0)

        def name(i: int) -> str:
            text = " ".join(self.rows[i].split())
            return f'row {i + 1} "{text if len(text) <= width else text[: width - 1] + "…"}"'

        for i, row in enumerate(found.itertuples()):
            felt = [j for j in range(n) if j != i and abs(influence[i, j]) > least_cell[j]]
            felt.sort(key=lambda j: -abs(influence[i, j]))

            def most(sign: int, i: int = i, felt: list[int] = felt) -> str:
                some = [f"row {j + 1} {influence[i, j]:+.3f}" for j in felt if sign * influence[i, j] > 0][:3]
                return ", ".join(some)

            mean = f"others: without it their loss changes by {row.teaches:+.3f} on average"
            said = {
                "redundant": f"is redundant: the others teach {row.carried:.0%} of what is learned of it",
                "teaches": f"teaches {mean if row.teaches > least_row else most(1)}",
                "harms": f"harms {mean}",
                "conflicts": f"conflicts with {most(-1)}: without it their loss is lower",
                "stands alone": f"stands alone: the others teach {row.carried:.0%} of it, and it changes none of them",
            }
            lines += [f"{name(i)} {said[word]}" for word in row.verdict.split(", ") if word]
        lines = lines or ["no row stands out"]
        if len(self.seeds) > 1:
            single = f"{least_cell[:n].min():.3f} to {least_cell[:n].max():.3f}"
            lines.append(
                f"noise: a mean influence below {least_row:.3f} tells nothing, nor a single one below {single}"
            )
        else:
            lines.append("one seed: what is noise is not known; measure with more seeds")
        if len(self.learning) > 1:
            fall, error = self.more_rows()
            steps = ", ".join(f"{count} rows {np.mean(each):.3f}" for count, each in self.learning.items())
            more = fall * np.log2((n + 3) / n)
            lines.append(f"best held-out loss by the number of rows: {steps}")
            lines.append(f"twice as many rows: {-fall:+.3f} ± {error:.3f} nats a token; three more about {-more:+.3f}")
        return "\n".join(lines)


def save_influence(run: RunDirectory, found: Influence) -> None:
    """Write the run's influence.json and, as a table, influence.csv."""
    write_json(run.influence_file, asdict(found))
    with written_whole(run.influence_file.with_suffix(".csv")) as temporary:
        found.table().to_csv(temporary, index=False, float_format="%.6g")


def load_influence(run: RunDirectory) -> Influence | None:
    """What `mini-symposium examples` measured of a run; None if nothing.

    Raises
    ------
    InputError
        If the file is not one that this kit wrote.
    """
    file = run.influence_file
    if not file.is_file():
        return None
    with refuse_other_shapes(f"{file}: not an influence that this kit wrote", "move it away, and measure again"):
        found = Influence(**read_object(file))
        shape = np.asarray(found.loss).shape
        if shape != (len(found.seeds), len(found.base), len(found.rows) + len(found.held_out)):
            raise ValueError(f"losses of shape {shape}")
        return found
