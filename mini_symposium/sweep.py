"""The experiment behind the claims: which recipes are trained, for how long, from which seeds.

Everything is relative to the recipe, whose learning rate is the low one of the contrast and a tenth of the high one,
so that one plan serves every scale. Dose is learning_rate x steps; the high rate at epoch 60 has the dose of the low
one at epoch 600.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mini_symposium.dataset import Example
from mini_symposium.finetune import train
from mini_symposium.recipe import Recipe
from mini_symposium.run_directory import RunDirectory

SEEDS = (42, 43, 44)
EPOCHS_LOW, EPOCHS_HIGH = 600, 100
"""The card's: 600 at the low rate, "after about 100" at the high one."""
SATURATED = 30
"""Epochs after which the high rate recites every row on the proxy; what compares speeds of reciting ends here."""
RANKS = (4, 8), (4, 32), (64, 128), (64, 32)
"""(r, alpha) beside the recipe's own 16 and 32."""
SHORTER_LOW = 200
"""Epochs of the low rate for the seeds after the first."""


@dataclass(frozen=True)
class Experiment:
    """One run directory: a recipe with `changes`, trained at each of `learning_rates` in one pass."""

    name: str
    learning_rates: tuple[float, ...]
    num_epochs: int
    seed: int
    changes: dict = field(default_factory=dict)
    """Of the recipe."""

    @property
    def probed(self) -> bool:
        """Whether held-out texts are measured too; a change of rank or schedule is judged by its training rows."""
        return not self.changes

    def recipe(self, base: Recipe) -> Recipe:
        return base.replace(
            learning_rate=min(self.learning_rates), num_epochs=self.num_epochs, seed=self.seed, **self.changes
        )

    def directory(self, root: Path) -> RunDirectory:
        return RunDirectory(root / f"{self.name}-seed-{self.seed}")

    def steps(self, n_examples: int) -> int:
        """Of all its adapters together."""
        return self.num_epochs * n_examples * len(self.learning_rates)


def plan(recipe: Recipe, seeds: Sequence[int] = SEEDS) -> list[Experiment]:
    """The experiments in the order in which they are worth having.

    - high, low: the contrast, and, in the high one's epochs 1 to 60, its dose control;
    - literal: the card's own rates, where the recipe's are not those;
    - rank-R-alpha-A: the rank alone (alpha = 2r), and with alpha = 32, which keeps the size of a step of the product
      BA about equal, for it adds up R coherent terms;
    - cosine, linear: at an equal peak, and at twice the peak, which is an equal dose.
    """
    low, high = recipe.learning_rate, 10 * recipe.learning_rate
    found = [Experiment("high", (high,), EPOCHS_HIGH, seed) for seed in seeds]
    others = [(f"rank-{r}-alpha-{a}", high, {"lora_r": r, "lora_alpha": a}) for r, a in RANKS]
    for rule in ("cosine", "linear"):
        others += [(f"{rule}-peak", high, {"lr_scheduler": rule}), (f"{rule}-dose", 2 * high, {"lr_scheduler": rule})]
    first, *rest = seeds
    found += [Experiment(name, (rate,), SATURATED, first, changes) for name, rate, changes in others]
    found += [Experiment("low", (low,), EPOCHS_LOW, first)]
    found += [Experiment(name, (rate,), SATURATED, seed, changes) for seed in rest for name, rate, changes in others]
    found += [Experiment("low", (low,), SHORTER_LOW, seed) for seed in rest]
    literal = tuple(rate for rate in (1e-6, 1e-7) if rate not in (low, high))
    return found + ([Experiment("literal", literal, EPOCHS_LOW, first)] if literal else [])


def finished(experiment: Experiment, root: Path) -> bool:
    run = experiment.directory(root)
    return all(experiment.num_epochs in run.checkpoints(rate) for rate in experiment.learning_rates)


def sweep(
    recipe: Recipe,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    root: Path,
    experiments: Sequence[Experiment] | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Train what of the plan is not there yet; an interrupted sweep goes on where it was.

    Says before each experiment how long the rest will take, from the steps that it has timed itself.
    """
    experiments = plan(recipe) if experiments is None else experiments
    waiting = [each for each in experiments if not finished(each, root)]
    say(f"{len(experiments) - len(waiting)} of {len(experiments)} experiments are there: {root}")
    done, started = 0, time.perf_counter()
    total = sum(each.steps(len(examples)) for each in waiting)
    for each in waiting:
        rate = (time.perf_counter() - started) / done if done else 0.4
        say(f"{each.name}, seed {each.seed}: about {rate * (total - done) / 60:.0f} minutes for this and the rest")
        tenth = max(1, each.num_epochs // 10)
        train(
            each.recipe(recipe),
            examples,
            each.directory(root),
            each.learning_rates,
            checkpoint_epochs=range(0, each.num_epochs + 1, tenth),
            held_out=held_out if each.probed else (),
        )
        done += each.steps(len(examples))
    say("the sweep is complete")
