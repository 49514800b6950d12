"""What can be asked: the base of a run, its checkpoints and merged models, and those of further runs on that base.

Looking costs nothing: only names and recipes are read here, no weights and no torch.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from mini_symposium.data.dataset import load_examples
from mini_symposium.errors import InputError
from mini_symposium.evaluation.answer_text import TrainingRows
from mini_symposium.run import RunDirectory, Training, resolve


def default_run(given: str = "") -> str:
    """The run to open: the given one, else $MINI_SYMPOSIUM_RUN, else runs/proxy."""
    return given or os.environ.get("MINI_SYMPOSIUM_RUN") or "runs/proxy"


@dataclass
class Shelf:
    """The models on one base by name, `1e-05/epoch-30`, and the rows that they were trained on.

    >>> shelf = Shelf()
    >>> shelf.open("tiny")
    'tiny: a base without checkpoints'
    >>> list(shelf.models), shelf.scale, len(shelf.queries)
    (['base'], 'tiny', 13)
    """

    base_model: str = ""
    four_bit: bool = True
    scale: str = ""
    run: RunDirectory | None = None
    """The first that was opened on this base."""
    models: dict[str, Path | None] = field(default_factory=dict)
    """The folder of each adapter and of each merged model; None for the base."""
    merged: set[str] = field(default_factory=set)
    """Which of the models are merged."""
    trainings: dict[str, Training] = field(default_factory=dict)
    """The trainings whose checkpoints are here, as `1e-05`, or `mine:1e-05` of a further run."""
    queries: list[str] = field(default_factory=list)
    """Of the training rows."""
    rows: TrainingRows = field(default_factory=lambda: TrainingRows({}))
    _datasets: dict[str, dict[str, str]] = field(default_factory=dict)

    def open(self, path: str) -> str:
        """Add a run, or a single adapter; a run of another base, or a base, takes the place of all that was open.

        Parameters
        ----------
        path
            A run directory, a folder with an adapter or with a model, or the name of a shipped recipe for its base.

        Returns
        -------
        str
            What was found there, and what is missing, in a sentence.

        Raises
        ------
        InputError
            If it is none of these. What was open stays.
        """
        found = resolve(path, "recipe", "adapter", "run", "model")
        if found.kind == "adapter":
            return self._add_adapter(found.path)
        recipe, base, four_bit = found.recipe, found.base_model, found.load_in_4bit
        if (base, four_bit) != (self.base_model, self.four_bit):
            vars(self).update(vars(Shelf(base, four_bit, recipe.scale if recipe else "own", models={"base": None})))
        if found.kind != "run":
            return f"{path}: a base without checkpoints" + (self._add_rows(recipe.dataset, "") if recipe else "")
        mine = self.run is None or self.run.path == found.path
        self.run = self.run or found.run
        count = self._add_checkpoints(found.run, "" if mine else f"{found.path.name}:")
        nothing = "" if count else f" yet: train with `mini-symposium train --run {path}`; only the base answers"
        trouble = self._add_rows(recipe.dataset, "" if mine else f"{found.path.name} ")
        return f"{path}: {count or 'no'} checkpoints on {base}{nothing}{trouble}"

    def _add_checkpoints(self, run: RunDirectory, prefix: str) -> int:
        """Add the checkpoints and merged models of a run; return how many it has."""
        models = {}
        for training in run.trainings():
            series = prefix + training.name
            self.trainings[series] = training
            for epoch, path in training.checkpoints().items():
                name, merged = f"{series}/epoch-{epoch}", run.merged(training.learning_rate, epoch)
                models[name] = path
                if (merged / "config.json").exists():
                    models[f"{name}/merged"] = merged
                    self.merged.add(f"{name}/merged")
        self.models |= models
        return len(models)

    def _add_adapter(self, path: Path) -> str:
        """A folder by itself. What it was trained on is told by its configuration, and checked when it is loaded."""
        if not self.base_model:
            raise InputError(f"{path}: an adapter; open the run or the base that it was trained on first")
        name, number = path.name, 2
        while name in self.models and self.models[name] != path:
            name, number = f"{path.name} ({number})", number + 1
        try:
            trained_on = json.loads((path / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}/adapter_config.json: cannot be read ({error!r})") from error
        self.models[name] = path
        return f"{path}: an adapter trained on {trained_on}"

    def _add_rows(self, dataset: str, prefix: str) -> str:
        """Add a dataset's rows once; returns what is wrong with it, for without them nothing shows as recited."""
        if dataset in self._datasets:
            return ""
        try:
            examples = load_examples(dataset)
        except InputError as error:
            return f"; recited text is not marked: {error}"
        self._datasets[dataset] = {f"{prefix}row {n}": example.text for n, example in enumerate(examples, start=1)}
        self.rows = TrainingRows({k: text for rows in self._datasets.values() for k, text in rows.items()})
        self.queries += [example.query for example in examples]
        return ""

    def newest(self) -> list[str]:
        """The base and the last checkpoint of each training."""
        return ["base", *(epochs[max(epochs)] for epochs in self.series().values())] if self.models else []

    def series(self) -> dict[str, dict[int, str]]:
        """The trainings, each with its models by epoch, in order."""
        found = {}
        for series, training in self.trainings.items():
            names = {epoch: f"{series}/epoch-{epoch}" for epoch in training.checkpoints()}
            if there := {epoch: name for epoch, name in names.items() if name in self.models}:
                found[series] = there
        return found
