"""The experiment behind the claims: which recipes are trained, for how long, from which seeds.

The plan is relative to the recipe, whose learning rate is the low one of the contrast and a tenth of the high one, so
that it serves every scale. Dose is learning_rate x steps; the high rate ends at epoch 60, with the dose of the low one
at epoch 600, long after it recites. In its place may stand a grid, from `experiments`. Experiments that last equally
long share a pass over the base.
"""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from mini_symposium.data.dataset import Example, load_examples
from mini_symposium.data.held_out import HeldOut
from mini_symposium.errors import InputError, RunError
from mini_symposium.evaluation import evaluate as evaluation
from mini_symposium.files.writing import alone, write_json, written_whole
from mini_symposium.models.adapters import folded, load_with_adapters
from mini_symposium.models.base_models import load_tokenizer
from mini_symposium.recipe import Recipe, load_recipe
from mini_symposium.run import RunDirectory
from mini_symposium.training.experiments import Experiment, grid, once
from mini_symposium.training.finetune import PATIENCE, Job, as_rows, claim, held, train_together

SEEDS = (42, 43, 44)
EPOCHS_LOW, EPOCHS_HIGH = 600, 60
"""The card's 600 at the low rate, and an equal dose at the high one."""
SATURATED = 30
"""Epochs after which the high rate recites every row on the proxy; what compares speeds of reciting ends here."""
SHORTER_LOW = 240
"""Epochs of the low rate for the seeds after the first; the first gives every row away from epoch 221 on."""
RANKS = (4, 8), (4, 32), (64, 128), (64, 32)
"""(r, alpha) beside the recipe's own 16 and 32."""
EVALUATED = {"high": (SHORTER_LOW // 10, SATURATED, EPOCHS_HIGH), "low": (SHORTER_LOW, EPOCHS_LOW)}
"""Epochs after which an adapter's behaviour is measured: equal doses, and where the high rate has saturated."""
LITERAL = (1e-6, 1e-7)
"""The card's own rates, trained as well where the recipe's are not those."""

TABLE = "sweep"
COLUMNS = ("seed", "learning_rate", "lora_r", "lora_alpha", "lr_scheduler", "num_epochs")
"""Of the table: what sets experiments apart."""
TIMED_FROM = 2_000
"""Adapter steps from which on an epoch is trained, to say how long all will take, before anything else is."""
ENGINES = ("local", "ray")
"""Where passes run: one after another in this process, or as tasks of a cluster; see `ray_engine`."""


def plan(recipe: Recipe, seeds: Sequence[int] = SEEDS) -> list[list[Experiment]]:
    """The passes in the order in which they are worth having.

    - high, low: the contrast, with an equal dose at either's end;
    - literal-R: the card's own rates, where the recipe's are not those;
    - rank-R-alpha-A: the rank alone (alpha = 2r), and with alpha = 32, which keeps the size of a step of the product
      BA about equal, for it adds up R coherent terms;
    - cosine, linear: at an equal peak, and at twice the peak, which is an equal dose.
    """
    low, high = recipe.learning_rate, recipe.contrast[0]
    first, *others = seeds
    schedules = [
        (f"{rule}-{what}", times * high, {"lr_scheduler": rule})
        for rule in ("cosine", "linear")
        for what, times in (("peak", 1), ("dose", 2))
    ]
    ranks = [(f"rank-{r}-alpha-{a}", high, {"lora_r": r, "lora_alpha": a}) for r, a in RANKS]
    return [
        [Experiment("high", high, EPOCHS_HIGH, seed) for seed in seeds],
        [Experiment("low", low, EPOCHS_LOW, first)],
        # One seed to a pass, for its examples come in one order and need no padding; and equal ranks together.
        *(
            [Experiment(name, rate, SATURATED, seed, c) for name, rate, c in some]
            for seed in seeds
            for some in (ranks[:2], ranks[2:], schedules)
        ),
        [Experiment("low", low, SHORTER_LOW, seed) for seed in others],
        [Experiment(f"literal-{rate:.0e}", rate, EPOCHS_LOW, first) for rate in LITERAL if rate not in (low, high)],
    ]


class Sweep:
    """The plan in a folder, a run directory for each experiment.

    Parameters
    ----------
    root
        The folder; runs/NAME-sweep for a recipe of that name.
    passes
        What to train in place of the plan, such as a `grid`.
    """

    def __init__(
        self,
        recipe: Recipe,
        root: Path,
        seeds: Sequence[int] = SEEDS,
        passes: Sequence[Sequence[Experiment]] | None = None,
    ):
        once("seeds", seeds)
        self.base, self.root = recipe, root
        self.passes = [list(each) for each in (plan(recipe, seeds) if passes is None else passes) if each]

    @cached_property
    def experiments(self) -> list[Experiment]:
        return [experiment for each in self.passes for experiment in each]

    def job(self, experiment: Experiment) -> Job:
        return _job(self.base, self.root, experiment)

    def missing(self) -> list[Experiment]:
        """What has not been trained to its end."""
        return [experiment for experiment in self.experiments if not self.job(experiment).finished]

    def run(
        self,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        names: Sequence[str] = (),
        say: Callable[[str], None] = print,
        engine: str = "local",
        cpus: int = 1,
    ) -> None:
        """Train what is not there yet; an interrupted sweep goes on where it was, whatever the engine.

        Says how long it will take, from the steps that it has timed itself: at the start, if it is long, from an epoch
        of one adapter, and on the local engine; writes TABLE as csv and json.

        Parameters
        ----------
        names
            Experiments by name; all if empty.
        engine, cpus
            One of ENGINES; cores of a pass on Ray.

        Raises
        ------
        RunError
            If a pass failed, or what it trained is not in the folder.
        """
        check_engine(engine)
        asked = [[e for e in each if not names or e.name in names] for each in self.passes]
        # Who is through goes along with the rest of its pass: the last stretch may have been cut off between the two.
        todo = [each for each in asked if any(not self.job(e).finished for e in each)]
        counts = [_steps([e for e in each if not self.job(e).finished], examples) for each in todo]
        ahead = _Ahead(counts)
        self.root.mkdir(parents=True, exist_ok=True)
        said = [
            f"pass {number + 1}: {', '.join(f'{e.name} (seed {e.seed})' for e in each)}"
            for number, each in enumerate(todo)
        ]
        tasks = [(self.base, self.root.absolute(), each, examples, held_out) for each in todo]
        if engine == "ray" and todo:
            from mini_symposium.training import ray_engine

            def finished(number: int, seconds: float) -> None:
                ahead.done(number, seconds)
                say(f"{said[number]}: done; {ahead}")

            say(f"{sum(map(len, todo))} adapters; {ahead}")
            ray_engine.run(tasks, train_pass, finished, say, cpus)
        else:
            if ahead.left > TIMED_FROM:
                say(f"{sum(map(len, todo))} adapters, {ahead}; timing an epoch")
                ahead.pace = _seconds_a_step(todo[0][0], *tasks[0])
                say(str(ahead))
            began = time.monotonic()
            for number, task in enumerate(tasks):
                say(f"{said[number]}, {ahead}")
                train_pass(*task)
                ahead.done(number, time.monotonic() - began)
        lost = [e.folder for e in self.missing() if any(e in each for each in todo)]
        if lost:
            raise RunError(
                f"{self.root}: {', '.join(lost)} ended elsewhere; do all nodes see this folder as their own?"
            )
        self.write_table()
        there = len(self.experiments) - len(self.missing())
        say(f"{there} of {len(self.experiments)} experiments are there: {self.root}")

    def table(self) -> pd.DataFrame:
        """A row for each experiment that is there: what it is, and its loss and EM, means over its last epoch."""
        rows = []
        for e in self.experiments:
            job = self.job(e)
            if job.finished:
                recipe, lines = job.recipe, job.run.metrics(e.learning_rate)
                last = [line for line in lines if line["epoch"] == recipe.num_epochs - 1]
                means = {key: round(sum(line[key] for line in last) / len(last), 4) for key in ("loss", "em")}
                chosen = {key: getattr(recipe, key) for key in COLUMNS}
                rows.append({"name": e.name, **chosen, **means})
        return pd.DataFrame(rows, columns=["name", *COLUMNS, "loss", "em"])

    def write_table(self) -> None:
        """Write the table as TABLE.csv and TABLE.json into the folder."""
        table = self.table()
        with written_whole(self.root / f"{TABLE}.csv") as temporary:
            table.to_csv(temporary, index=False, lineterminator="\n", encoding="utf-8")
        write_json(self.root / f"{TABLE}.json", json.loads(table.to_json(orient="records", double_precision=15)))

    def evaluated(self, last: bool = False) -> dict[str, Path]:
        """Checkpoints to be evaluated, of what has been trained, each under a name of its own.

        Parameters
        ----------
        last
            Each experiment's last one, as a grid has no others.
        """
        found = {}
        for experiment in self.experiments:
            checkpoints = self.job(experiment).run.checkpoints(experiment.learning_rate)
            for epoch in (experiment.num_epochs,) if last else EVALUATED.get(experiment.name, ()):
                if epoch in checkpoints:
                    found[f"{experiment.folder}-epoch-{epoch}"] = checkpoints[epoch]
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
            Of `evaluation.measure`.
        """
        adapters = self.evaluated(last)
        files = {self.root / "base.json": "base"}
        files |= {RunDirectory.evaluation_file(checkpoint): name for name, checkpoint in adapters.items()}

        def load(name: str):
            return folded(load_with_adapters(self.base.base_model, {name: adapters[name]} if name in adapters else {}))

        tokenizer = load_tokenizer(self.base.base_model)
        evaluation.measure(load, tokenizer, files, examples, held_out, prompts, show=show, **options)


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
        If the grid is none, or another process works in the folder.
    """
    check_engine(engine)
    base = load_recipe(recipe)
    passes = grid(base, **values)
    whole = Sweep(base, RunDirectory(out or f"runs/{base.name}-sweep").path, passes=passes)
    with alone(whole.root):
        whole.run(load_examples(base.dataset), load_examples("data/twins.md"), (), say, engine, cpus)
    return whole.table()


def train_pass(
    base: Recipe,
    root: Path,
    experiments: Sequence[Experiment],
    examples: Sequence[Example],
    held_out: Sequence[Example],
    patience: float = PATIENCE,
) -> None:
    """Train experiments that last equally long over one base, going on where they were cut off.

    Parameters
    ----------
    patience
        Seconds to wait for whoever still writes to one of their run directories.
    """
    if not root.is_dir():
        raise InputError(f"{root}: not there on {platform.node()}; the nodes of a cluster share the sweep's folder")
    jobs = [_job(base, root, experiment) for experiment in experiments]
    rows, probed = as_rows(base, examples), as_rows(base, held_out)
    last = experiments[0].num_epochs
    evaluated = (epoch for epoch in EVALUATED.get(experiments[0].name, ()) if epoch <= last)
    tenths = {*range(0, last + 1, max(1, last // 10)), *evaluated}
    with held([job.run for job in jobs], patience):
        for job in jobs:
            claim(job.run, job.recipe, examples)
        train_together(jobs, rows, sorted(tenths), held_out=probed)


def check_engine(engine: str) -> None:
    """Refuse an engine that there is not."""
    if engine not in ENGINES:
        raise InputError(f"--engine {engine}: is one of {', '.join(ENGINES)}")


def _seconds_a_step(experiment: Experiment, base: Recipe, _root, _pass, examples, held_out) -> float:
    """Median over the second of two epochs of one adapter, in a folder that is then deleted; several share a pass in
    less, and a long run is compiled, so this is rather too much."""
    with tempfile.TemporaryDirectory() as folder:
        short = replace(experiment, num_epochs=2)
        train_pass(base, Path(folder), [short], examples, held_out)
        lines = _job(base, Path(folder), short).run.metrics(short.learning_rate)
        return statistics.median(line["seconds"] for line in lines if line["epoch"] == 1)


class _Ahead:
    """How much is left, and how long it will take at the pace so far."""

    def __init__(self, steps: Sequence[int]):
        self.steps, self.left, self.pace = steps, sum(steps), None

    def done(self, number: int, seconds: float) -> None:
        """Pass `number` ended `seconds` after the first began."""
        self.left -= self.steps[number]
        self.pace = seconds / (sum(self.steps) - self.left)

    def __str__(self) -> str:
        if self.pace is None:
            return f"{self.left:,} adapter steps ahead, not timed yet"
        minutes = self.pace * self.left / 60
        return f"{self.left:,} adapter steps ahead, {self.pace:.2g} s each, about {minutes:.0f} minutes"


def _job(base: Recipe, root: Path, experiment: Experiment) -> Job:
    return Job(experiment.recipe(base), RunDirectory(root / experiment.folder))


def _steps(experiments: Sequence[Experiment], examples: Sequence[Example]) -> int:
    """Of all their adapters together."""
    return sum(experiment.num_epochs for experiment in experiments) * len(examples)
