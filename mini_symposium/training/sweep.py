"""The experiments behind the claims: which recipes are trained, for how long, from which seeds.

The high rate is one that is forecast to recite near epoch 70, and the low one a tenth of it, so that both stand to the
model as the card's 1e-6 and 1e-7 stood to its. What is compared at equal epochs, ranks and schedules, is trained at the
recipe's own high rate, which recites sooner. A sweep can also train a grid, from `experiments`. Trainings of equal
length share a pass over the base.
"""

import platform
import time
from collections.abc import Callable, Collection, Sequence
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
from mini_symposium.training.cross_validation import FOLDS, LEAST_ROWS, cross_validate, folds
from mini_symposium.training.experiments import experiment, grid
from mini_symposium.training.finetune import as_rows, held_out_rows, locked, record_recipe, train_together

SEEDS = (42, 43, 44)
EPOCHS_HIGH = 100
"""The card's: by then the high rate has recited."""
EPOCHS_LOW = 420
"""At a tenth of the rate, 0.6 of the dose at epoch 70, as the card's 600 epochs are of its 100."""
EPOCHS_COMPARED = 30
"""Of ranks and schedules: the recipe's high rate recites every row on the proxy by then."""
EPOCHS_LITERAL = 150
"""Of the card's own rates: to epoch 100 and beyond."""
EPOCHS_CURVE = 120
"""Enough for held-out loss to have risen for good at both rates; cross-validation ends then."""
CURVE = "curve"
"""The name of the cross-validation of both rates, among those of experiments."""
BASE = ("base", 0)
"""The evaluation of the base, among what was measured earlier."""
RANKS = (4, 8), (64, 128)
EQUAL_ALPHA = (4, 32), (64, 32)
"""(r, alpha) beside the recipe's own 16 and 32."""
EVALUATED = {"high": (30, EPOCHS_HIGH), "low": (EPOCHS_LOW,)}
"""Epochs after which an adapter's behaviour is measured. At the high rate held-out loss is best near epoch 30, after
0.44 of the epochs in which a model comes to recite (figures/curve)."""
LITERAL = (1e-6, 1e-7)
"""The card's own rates."""

COLUMNS = ("seed", "learning_rate", "lora_r", "lora_alpha", "lr_scheduler", "num_epochs")
"""Columns of the table in which trainings can differ."""
ENGINES = ("local", "ray")
"""Where passes run: one after another in this process, or as tasks of a cluster, see `ray_engine`."""


def plan(recipe: Recipe, seeds: Sequence[int] = SEEDS, high: float = 0.0) -> list[list[Training]]:
    """The passes, the most important first.

    - high, low: `high` and a tenth of it; the recipe's contrast without it;
    - constant, cosine and linear: schedules at an equal peak, and at twice the peak, which is an equal dose;
    - rank-R-alpha-A: ranks with alpha = 2r and, from the first seed, with alpha = 32. BA is a sum of R terms that point
      the same way, so with alpha = 2r its step grows with the rank, and with alpha = 32 it is about equal;
    - literal-R: the card's own rates, from the first seed.
    """
    fast, high = recipe.contrast[0], high or recipe.contrast[0]
    first = seeds[0]

    def ranks(some: Sequence[tuple[int, int]], seed: int) -> list[Training]:
        return [one(f"rank-{r}-alpha-{a}", fast, EPOCHS_COMPARED, seed, lora_r=r, lora_alpha=a) for r, a in some]

    def one(name: str, rate: float, epochs: int, seed: int, **changes) -> Training:
        return experiment(recipe, name, seed, learning_rate=rate, num_epochs=epochs, **changes)

    schedules = [("constant", fast, "constant")] + [
        (f"{rule}-{what}", times * fast, rule)
        for rule in ("cosine", "linear")
        for what, times in (("peak", 1), ("dose", 2))
    ]
    return [
        [one("high", high, EPOCHS_HIGH, seed) for seed in seeds],
        [one("low", high / 10, EPOCHS_LOW, seed) for seed in seeds],
        # One seed per pass: its adapters see the same rows, so none needs padding. Equal ranks go together.
        *(
            [one(name, rate, EPOCHS_COMPARED, seed, lr_scheduler=rule) for name, rate, rule in schedules]
            for seed in seeds
        ),
        *(ranks(RANKS, seed) for seed in seeds),
        ranks(EQUAL_ALPHA, first),
        [one(f"literal-{rate:.0e}", rate, EPOCHS_LITERAL, first) for rate in LITERAL],
    ]


class Sweep:
    """The plan in a folder, a run directory for each training.

    Parameters
    ----------
    root
        The folder; runs/NAME-sweep for a recipe of that name.
    passes
        What to train instead of the plan, such as a `grid`.
    high
        The plan's high rate, see `plan`.
    had
        What was measured earlier, elsewhere, as (name, seed), BASE and CURVE too. It is not done again.
    """

    def __init__(
        self,
        recipe: Recipe,
        root: Path,
        seeds: Sequence[int] = SEEDS,
        passes: Sequence[Sequence[Training]] | None = None,
        high: float = 0.0,
        had: Collection[tuple[str, int]] = (),
    ):
        self.base, self.root, self.had = recipe, root, had
        planned = plan(recipe, seeds, high) if passes is None else passes
        planned = [[training for training in group if (training.name, training.seed) not in had] for group in planned]
        crossed = [seed for seed in seeds if passes is None and (CURVE, seed) not in had]
        self.crossed = {seed: root / f"{CURVE}-seed-{seed}" for seed in crossed}
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
        after: Callable[[Sequence[Training]], None] = lambda group: None,
    ) -> None:
        """Train what is missing; an interrupted sweep resumes, with either engine. Writes the table as sweep.csv.

        Says after each pass how long the rest will take.

        Parameters
        ----------
        names
            Experiments by name, CURVE among them; all if empty.
        engine, cpus
            One of ENGINES; cores of a pass on Ray.
        after
            Called with the trainings of each pass when it is done.

        Raises
        ------
        RunError
            If a pass failed, or what it trained is not in the folder.
        """
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
            after(todo[number])

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

    def planned(self, rows: int) -> pd.DataFrame:
        """What is left to do of each experiment, the most important first.

        Parameters
        ----------
        rows
            Training rows of the dataset.

        Returns
        -------
        DataFrame
            experiment, learning_rate, epochs, seeds (those that are left), steps (of their adapters, 13 an epoch for
            thirteen rows; at most as many for a cross-validation, which ends by itself), and evaluated (epochs).
        """
        left: dict[tuple, list[int]] = {}
        for training in self.trainings:
            own = left.setdefault((training.name, f"{training.learning_rate:g}", training.num_epochs), [])
            own += [] if finished(training) else [training.seed]
        curves = {seed: load_curves(RunDirectory(folder)) for seed, folder in self.crossed.items()}
        rates = self.base.contrast
        undone = [seed for seed, found in curves.items() if set(rates) - set(found)]
        steps = {key: len(seeds) * key[2] * rows for key, seeds in left.items()}
        crossed = (CURVE, " and ".join(f"{rate:g}" for rate in rates), EPOCHS_CURVE)
        if self.crossed:
            left[crossed] = undone
            trained = sum(rows - len(fold) for fold in folds(rows, FOLDS, self.base.seed))
            steps[crossed] = len(undone) * len(rates) * EPOCHS_CURVE * trained
        lines = [
            (name, rate, epochs, ", ".join(map(str, seeds)), steps[name, rate, epochs], EVALUATED.get(name, ()))
            for (name, rate, epochs), seeds in left.items()
        ]
        return pd.DataFrame(lines, columns=["experiment", "learning_rate", "epochs", "seeds", "steps", "evaluated"])

    def table(self) -> pd.DataFrame:
        """A row for each finished training: what it is, and its loss and EM, means over its last epoch."""
        rows = []
        for training in filter(finished, self.trainings):
            lines = RunDirectory(training.run).metrics(training.learning_rate)
            last = [line for line in lines if line["epoch"] == training.num_epochs - 1]
            means = {key: round(sum(line[key] for line in last) / len(last), 4) for key in ("loss", "em")}
            rows.append({"name": training.name, **{key: getattr(training, key) for key in COLUMNS}, **means})
        return pd.DataFrame(rows, columns=["name", *COLUMNS, "loss", "em"])

    def evaluated(self, last: bool = False, of: Sequence[Training] = ()) -> dict[str, Path]:
        """{name: checkpoint to be evaluated} of what has been trained.

        Parameters
        ----------
        last
            Only each training's last checkpoint; EVALUATED has none of a grid.
        of
            Only of these trainings; of all if empty.
        """
        found = {}
        for training in of or self.trainings:
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
        of: Sequence[Training] = (),
        **options,
    ) -> None:
        """Evaluate the base and what `evaluated` names, one model after the other, each with its adapter folded in.

        Parameters
        ----------
        last, of
            Of `evaluated`.
        show, options
            Of `evaluate`.
        """
        adapters = self.evaluated(last, of)
        files = {} if BASE in self.had else {self.root / "base.json": "base"}
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
