"""The experiments behind the claims: which recipes are trained, for how long, from which seeds.

The low learning rate of the plan is the recipe's own, its high one ten times that, so that the plan serves every scale.
Dose is learning_rate x steps; the high rate ends at epoch 60, long after it recites, with the low one's dose at epoch
600. A sweep can also train a grid, from `experiments`. Trainings of equal length share a pass over the base.
"""

import platform
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import pandas as pd

from mini_symposium.data.dataset import Example, fingerprint, load_examples
from mini_symposium.data.held_out import HeldOut
from mini_symposium.errors import InputError, RunError
from mini_symposium.evaluation.best_epoch import load_curves
from mini_symposium.evaluation.evaluate import evaluate
from mini_symposium.files.writing import alone, written_whole
from mini_symposium.models.adapters import folded, load_with_adapters
from mini_symposium.models.base_models import load_tokenizer
from mini_symposium.recipe import Recipe, load_recipe
from mini_symposium.run import RunDirectory, Training
from mini_symposium.training.checkpoints import finished
from mini_symposium.training.cross_validation import LEAST_ROWS, cross_validate
from mini_symposium.training.experiments import experiment, grid, refuse_repeats
from mini_symposium.training.finetune import as_rows, held_out_rows, locked, record_recipe, train_together

SEEDS = (42, 43, 44)
EPOCHS_LOW, EPOCHS_HIGH = 600, 60
"""The card's 600 at the low rate, and an equal dose at the high one."""
SATURATED = 30
"""Epochs after which the high rate recites every row on the proxy; comparisons of how fast it recites end here."""
EPOCHS_CURVE = 120
"""Enough for held-out loss to have risen for good at both rates; cross-validation ends then."""
CURVE = "curve"
"""The name of the cross-validation of both rates, among those of experiments."""
SHORTER_LOW = 240
"""Epochs of the low rate for later seeds. The first seed recites every row from epoch 221 on."""
RANKS = (4, 8), (4, 32), (64, 128), (64, 32)
"""(r, alpha) beside the recipe's own 16 and 32."""
EVALUATED = {"high": (SHORTER_LOW // 10, SATURATED, EPOCHS_HIGH), "low": (SHORTER_LOW, EPOCHS_LOW)}
"""Epochs after which an adapter's behaviour is measured: equal doses, and where the high rate has saturated."""
LITERAL = (1e-6, 1e-7)
"""The card's own rates, also trained if the recipe's rates are others."""

COLUMNS = ("seed", "learning_rate", "lora_r", "lora_alpha", "lr_scheduler", "num_epochs")
"""Columns of the table in which trainings can differ."""
ENGINES = ("local", "ray")
"""Where passes run: one after another in this process, or as tasks of a cluster, see `ray_engine`."""


def plan(recipe: Recipe, seeds: Sequence[int] = SEEDS) -> list[list[Training]]:
    """The passes, the most important first.

    - high, low: the two rates of the contrast, which end at the same dose;
    - literal-R: the card's own rates, where the recipe's are not those;
    - rank-R-alpha-A: other ranks, once with alpha = 2r and once with alpha = 32. BA is a sum of R terms that point the
      same way, so with alpha = 2r its step grows with the rank, and with alpha = 32 it is about equal at every rank;
    - cosine, linear: at an equal peak, and at twice the peak, which is an equal dose.
    """
    low, high = recipe.learning_rate, recipe.contrast[0]
    first, *others = seeds
    schedules = [
        (f"{rule}-{what}", {"lr_scheduler": rule, "learning_rate": times * high})
        for rule in ("cosine", "linear")
        for what, times in (("peak", 1), ("dose", 2))
    ]
    ranks = [(f"rank-{r}-alpha-{a}", {"lora_r": r, "lora_alpha": a, "learning_rate": high}) for r, a in RANKS]

    def one(name: str, rate: float, epochs: int, seed: int) -> Training:
        return experiment(recipe, name, seed, learning_rate=rate, num_epochs=epochs)

    return [
        [one("high", high, EPOCHS_HIGH, seed) for seed in seeds],
        [one("low", low, EPOCHS_LOW, first)],
        # One seed per pass: its adapters see the same rows, so none needs padding. Equal ranks go together.
        *(
            [experiment(recipe, name, seed, num_epochs=SATURATED, **changes) for name, changes in group]
            for seed in seeds
            for group in (ranks[:2], ranks[2:], schedules)
        ),
        [one("low", low, SHORTER_LOW, seed) for seed in others],
        [one(f"literal-{rate:.0e}", rate, EPOCHS_LOW, first) for rate in LITERAL if rate not in (low, high)],
    ]


class Sweep:
    """The plan in a folder, a run directory for each training.

    Parameters
    ----------
    root
        The folder; runs/NAME-sweep for a recipe of that name.
    passes
        What to train instead of the plan, such as a `grid`.
    """

    def __init__(
        self,
        recipe: Recipe,
        root: Path,
        seeds: Sequence[int] = SEEDS,
        passes: Sequence[Sequence[Training]] | None = None,
    ):
        refuse_repeats("seeds", seeds)
        self.base, self.root = recipe, root
        planned = plan(recipe, seeds) if passes is None else passes
        self.crossed = {seed: root / f"{CURVE}-seed-{seed}" for seed in seeds if passes is None}
        """{seed: the run directory of its cross-validation}, for C0."""
        self.passes = [[training.below(root.absolute()) for training in group] for group in planned if group]

    @cached_property
    def trainings(self) -> list[Training]:
        return [training for group in self.passes for training in group]

    def run(
        self,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        names: Sequence[str] = (),
        say: Callable[[str], None] = print,
        engine: str = "local",
        cpus: int = 1,
    ) -> None:
        """Train what is missing; an interrupted sweep resumes, with either engine. Writes the table as sweep.csv.

        Says after each pass how long the rest will take.

        Parameters
        ----------
        names
            Experiments by name, CURVE among them; all if empty.
        engine, cpus
            One of ENGINES; cores of a pass on Ray.

        Raises
        ------
        RunError
            If a pass failed, or what it trained is not in the folder.
        """
        check_engine(engine)
        asked = [[t for t in group if not names or t.name in names] for group in self.passes]
        # Finished trainings stay with the rest of their pass, which may resume from their last common checkpoint.
        todo = [group for group in asked if not all(map(finished, group))]
        counts = [sum(t.num_epochs for t in group if not finished(t)) * len(examples) for group in todo]
        left = sum(counts)
        self.root.mkdir(parents=True, exist_ok=True)
        tasks = [(group, examples, held_out) for group in todo]

        def done(number: int, seconds: float) -> None:
            nonlocal left
            left -= counts[number]
            pace = seconds / (sum(counts) - left)
            names = ", ".join(f"{t.name} (seed {t.seed})" for t in todo[number])
            ahead = f"{left:,} adapter steps ahead, {pace:.2g} s each, about {pace * left / 60:.0f} minutes"
            say(f"pass {number + 1} is done: {names}; {ahead}")

        if todo:
            say(f"passes {len(todo)}, adapters {sum(map(len, todo))}, adapter steps {left:,}")
        if engine == "ray" and todo:
            from mini_symposium.training import ray_engine

            ray_engine.run(tasks, train_experiments, done, say, cpus)
        else:
            began = time.monotonic()
            for number, task in enumerate(tasks):
                train_experiments(*task)
                done(number, time.monotonic() - began)
        lost = [t.run.name for group in todo for t in group if not finished(t)]
        if lost:
            raise RunError(
                f"{self.root}: the results of {', '.join(lost)} are not here; check that all nodes share this folder"
            )
        with written_whole(self.root / "sweep.csv") as temporary:
            self.table().to_csv(temporary, index=False, lineterminator="\n", encoding="utf-8")
        crossed = self.crossed if not names or CURVE in names else {}
        if crossed and CURVE not in names and len(examples) < LEAST_ROWS:
            say(f"no held-out curves: they take {LEAST_ROWS} rows or more")
            crossed = {}
        for seed, folder in crossed.items():
            self.cross_validate(seed, folder, examples)
        there = len(list(filter(finished, self.trainings)))
        say(f"{there} of {len(self.trainings)} experiments are finished, in {self.root}")

    def cross_validate(self, seed: int, folder: Path, examples: Sequence[Example]) -> None:
        """Measure the held-out curves of both rates of the contrast, if they are not there."""
        recipe, run = self.base.replace(seed=seed, num_epochs=EPOCHS_CURVE), RunDirectory(folder)
        if missing := [rate for rate in recipe.contrast if rate not in load_curves(run)]:
            with locked([folder]):
                record_recipe(run, recipe, fingerprint(examples))
            cross_validate(recipe, examples, run, missing)

    def table(self) -> pd.DataFrame:
        """A row for each finished training: what it is, and its loss and EM, means over its last epoch."""
        rows = []
        for training in filter(finished, self.trainings):
            lines = RunDirectory(training.run).metrics(training.learning_rate)
            last = [line for line in lines if line["epoch"] == training.num_epochs - 1]
            means = {key: round(sum(line[key] for line in last) / len(last), 4) for key in ("loss", "em")}
            rows.append({"name": training.name, **{key: getattr(training, key) for key in COLUMNS}, **means})
        return pd.DataFrame(rows, columns=["name", *COLUMNS, "loss", "em"])

    def evaluated(self, last: bool = False) -> dict[str, Path]:
        """{name: checkpoint to be evaluated} of what has been trained.

        Parameters
        ----------
        last
            Only each training's last checkpoint; EVALUATED has none of a grid.
        """
        found = {}
        for training in self.trainings:
            kept = training.checkpoints()
            for epoch in (training.num_epochs,) if last else EVALUATED.get(training.name, ()):
                if epoch in kept:
                    found[f"{training.run.name}-epoch-{epoch}"] = kept[epoch]
        return found

    def measure(
        self,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        prompts: Sequence[HeldOut],
        last: bool = False,
        show: Callable[[str], object] = print,
        **options,
    ) -> None:
        """Evaluate the base and what `evaluated` names, one model after the other, each with its adapter folded in.

        Parameters
        ----------
        show, options
            Of `evaluate`.
        """
        adapters = self.evaluated(last)
        files = {self.root / "base.json": "base"}
        files |= {RunDirectory.evaluation_file(checkpoint): name for name, checkpoint in adapters.items()}

        def load(name: str):
            return folded(load_with_adapters(self.base.base_model, {name: adapters[name]} if name in adapters else {}))

        tokenizer = load_tokenizer(self.base.base_model)
        evaluate(load, tokenizer, files, examples, held_out, prompts, show=show, **options)


def run_grid(
    recipe: str = "proxy",
    out: str = "",
    engine: str = "local",
    cpus: int = 1,
    say: Callable[[str], None] = print,
    **values,
) -> pd.DataFrame:
    """Train a grid, as `mini-symposium sweep --learning-rates ...` does, and return its table.

    Parameters
    ----------
    out, engine, cpus
        As `Sweep` and `Sweep.run` take them.
    values
        learning_rates, ranks, ...: what `grid` takes.

    Raises
    ------
    InputError
        If a value of the grid is refused, or another process works in the folder.
    """
    check_engine(engine)
    base = load_recipe(recipe)
    passes = grid(base, **values)
    whole = Sweep(base, RunDirectory(out or f"runs/{base.name}-sweep").path, passes=passes)
    with alone(whole.root):
        whole.run(load_examples(base.dataset), load_examples("data/twins.md"), (), say, engine, cpus)
    return whole.table()


def train_experiments(
    trainings: Sequence[Training],
    examples: Sequence[Example],
    held_out: Sequence[Example],
    patience: float | None = None,
) -> None:
    """Train trainings of equal length over one base, resuming where they were cut off.

    Parameters
    ----------
    patience
        Seconds to wait for a process that still writes to one of their run directories.
    """
    first = trainings[0]
    root = first.run.parent
    if not root.is_dir():
        raise InputError(f"{root}: not there on {platform.node()}; the nodes of a cluster share the sweep's folder")
    rows, probed = as_rows(first.recipe, examples), held_out_rows(first.recipe, held_out)
    last = first.num_epochs
    evaluated = (epoch for epoch in EVALUATED.get(first.name, ()) if epoch <= last)
    tenths = {*range(0, last + 1, max(1, last // 10)), *evaluated}
    with locked([training.run for training in trainings], patience):
        for training in trainings:
            record_recipe(RunDirectory(training.run), training.recipe, fingerprint(examples))
        # Twins after every epoch of what the ledger compares at equal training loss.
        train_together(trainings, rows, sorted(tenths), held_out=probed, probe_every=1 if last <= EPOCHS_HIGH else 0)


def check_engine(engine: str) -> None:
    """Refuse an engine that does not exist."""
    if engine not in ENGINES:
        raise InputError(f"--engine {engine}: is one of {', '.join(ENGINES)}")
