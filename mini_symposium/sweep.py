"""The experiment behind the claims: which recipes are trained, for how long, from which seeds.

Everything is relative to the recipe, whose learning rate is the low one of the contrast and a tenth of the high one,
so that one plan serves every scale. Dose is learning_rate x steps; the high rate at epoch 60 has the dose of the low
one at epoch 600. Experiments that last equally long share a pass over the base.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mini_symposium.dataset import Example
from mini_symposium.finetune import Job, as_rows, claim, train_together
from mini_symposium.recipe import Recipe
from mini_symposium.run_directory import RunDirectory

SEEDS = (42, 43, 44)
EPOCHS_LOW, EPOCHS_HIGH = 600, 100
"""The card's: 600 at the low rate, "after about 100" at the high one."""
SATURATED = 30
"""Epochs after which the high rate recites every row on the proxy; what compares speeds of reciting ends here."""
SHORTER_LOW = 200
"""Epochs of the low rate for the seeds after the first."""
RANKS = (4, 8), (4, 32), (64, 128), (64, 32)
"""(r, alpha) beside the recipe's own 16 and 32."""
EVALUATED = {"high": (EPOCHS_LOW // 10, EPOCHS_HIGH), "low": (SHORTER_LOW, EPOCHS_LOW)}
"""Epochs after which an adapter's behaviour is measured: its end, and the high rate's at the dose of the low one's."""
LITERAL = (1e-6, 1e-7)
"""The card's own rates, trained as well where the recipe's are not those."""


@dataclass(frozen=True)
class Experiment:
    """One adapter: a recipe with `changes`, in a run directory of its own."""

    name: str
    learning_rate: float
    num_epochs: int
    seed: int
    changes: dict = field(default_factory=dict)
    """Of the recipe: rank, alpha, schedule."""

    @property
    def folder(self) -> str:
        """Name of its run directory below the sweep's folder."""
        return f"{self.name}-seed-{self.seed}"

    def recipe(self, base: Recipe) -> Recipe:
        """The recipe that it trains."""
        same = {"learning_rate": self.learning_rate, "num_epochs": self.num_epochs, "seed": self.seed}
        return base.replace(**same, **self.changes)


def plan(recipe: Recipe, seeds: Sequence[int] = SEEDS) -> list[list[Experiment]]:
    """The passes in the order in which they are worth having.

    - high, low: the contrast, and, in the high one's epochs 1 to 60, its dose control;
    - literal-R: the card's own rates, where the recipe's are not those;
    - rank-R-alpha-A: the rank alone (alpha = 2r), and with alpha = 32, which keeps the size of a step of the product
      BA about equal, for it adds up R coherent terms;
    - cosine, linear: at an equal peak, and at twice the peak, which is an equal dose.
    """
    low, high = recipe.learning_rate, recipe.contrast[0]
    first, *others = seeds
    literal = [rate for rate in LITERAL if rate not in (low, high)]
    passes = [
        [Experiment("high", high, EPOCHS_HIGH, seed) for seed in seeds],
        [Experiment("low", low, EPOCHS_LOW, first)]
        + [Experiment(f"literal-{rate:.0e}", rate, EPOCHS_LOW, first) for rate in literal],
    ]
    schedules = [
        (f"{rule}-{what}", times * high, {"lr_scheduler": rule})
        for rule in ("cosine", "linear")
        for what, times in (("peak", 1), ("dose", 2))
    ]
    ranks = [(f"rank-{r}-alpha-{a}", high, {"lora_r": r, "lora_alpha": a}) for r, a in RANKS]
    for some in (ranks[:2], ranks[2:], schedules):  # equal ranks together: a smaller one is padded to the largest
        passes.append([Experiment(name, rate, SATURATED, seed, c) for seed in seeds for name, rate, c in some])
    return [*passes, [Experiment("low", low, SHORTER_LOW, seed) for seed in others]]


class Sweep:
    """The plan in a folder, a run directory for each experiment.

    Parameters
    ----------
    root
        The folder; runs/NAME-sweep for a recipe of that name.
    """

    def __init__(self, recipe: Recipe, root: Path, seeds: Sequence[int] = SEEDS):
        self.base, self.root, self.passes = recipe, root, [each for each in plan(recipe, seeds) if each]

    @cached_property
    def experiments(self) -> list[Experiment]:
        return [experiment for each in self.passes for experiment in each]

    def job(self, experiment: Experiment) -> Job:
        return Job(experiment.recipe(self.base), RunDirectory(self.root / experiment.folder))

    def missing(self) -> list[Experiment]:
        """What has not been trained to its end."""
        return [experiment for experiment in self.experiments if not self.job(experiment).finished]

    def run(
        self,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        names: Sequence[str] = (),
        say: Callable[[str], None] = print,
    ) -> None:
        """Train what is not there yet; an interrupted sweep goes on where it was.

        Says before each pass how long it and the rest will take, from the steps that it has timed itself.

        Parameters
        ----------
        names
            Experiments by name; all if empty.
        """
        todo = [[e for e in each if not names or e.name in names] for each in self.passes]
        todo = [[e for e in each if not self.job(e).finished] for each in todo]
        left = sum(_steps(each, examples) for each in todo)
        done, began = 0, time.monotonic()
        for number, each in enumerate(filter(None, todo)):
            rate = (time.monotonic() - began) / done if done else None
            ahead = f"about {rate * (left - done) / 60:.0f} minutes for this and the rest" if rate else "not timed yet"
            what = ", ".join(dict.fromkeys(experiment.name for experiment in each))
            say(f"pass {number + 1}: {what}; {len(each)} adapters, {left - done:,} adapter steps ahead, {ahead}")
            jobs = [self.job(experiment) for experiment in each]
            rows, probed = as_rows(self.base, examples), as_rows(self.base, held_out)
            for job in jobs:
                claim(job.run, job.recipe, examples)
            last = each[0].num_epochs
            tenths = {
                *range(0, last + 1, max(1, last // 10)),
                *(e for e in EVALUATED.get(each[0].name, ()) if e <= last),
            }
            train_together(jobs, rows, sorted(tenths), held_out=probed)
            done += _steps(each, examples)
        there = len(self.experiments) - len(self.missing())
        say(f"{there} of {len(self.experiments)} experiments are there: {self.root}")

    def evaluated(self) -> dict[str, Path]:
        """Checkpoints to be evaluated, of what has been trained, each under a name of its own."""
        found = {}
        for experiment in self.experiments:
            checkpoints = self.job(experiment).run.checkpoints(experiment.learning_rate)
            for epoch in EVALUATED.get(experiment.name, ()):
                if epoch in checkpoints:
                    found[f"{experiment.folder}-epoch-{epoch}"] = checkpoints[epoch]
        return found


def _steps(experiments: Sequence[Experiment], examples: Sequence[Example]) -> int:
    """Of all their adapters together."""
    return sum(experiment.num_epochs for experiment in experiments) * len(examples)
