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
from mini_symposium.recipe import SHIPPED, load_recipe
from mini_symposium.run import RunDirectory


@dataclass(frozen=True)
class Model:
    """What answers under a name: the base, which has no path, an adapter on it, or a merged model."""

    path: Path | None = None
    merged: bool = False
    series: str = ""
    """The training that it is a checkpoint of, as `1e-05`."""
    epoch: int = 0


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
    models: dict[str, Model] = field(default_factory=dict)
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
        run = RunDirectory(path)
        if path not in SHIPPED and (run.path / "adapter_config.json").exists():
            return self._add_adapter(run.path)
        if path in SHIPPED or run.recipe_file.exists():
            recipe = load_recipe(path if path in SHIPPED else run.recipe_file)
            base, four_bit, scale = recipe.base_model, True, recipe.scale
        elif (run.path / "config.json").exists():
            recipe, base, four_bit, scale = None, str(run.path), False, "own"
        else:
            raise InputError(
                f"{path}: neither a run, a model nor an adapter, nor one of {', '.join(SHIPPED)}; "
                "run `make reproduce` first, or open another"
            )
        if (base, four_bit) != (self.base_model, self.four_bit):
            vars(self).update(vars(Shelf(base, four_bit, scale, models={"base": Model()})))
        if recipe is None or path in SHIPPED:
            return f"{path}: a base without checkpoints" + (self._add_rows(recipe.dataset, "") if recipe else "")
        mine = self.run is None or self.run.path == run.path
        self.run = self.run or run
        found = self._models(run, "" if mine else f"{run.path.name}:")
        self.models |= found
        nothing = "" if found else f" yet: train with `mini-symposium train --run {path}`; only the base answers"
        trouble = self._add_rows(recipe.dataset, "" if mine else f"{run.path.name} ")
        return f"{path}: {len(found) or 'no'} checkpoints on {base}{nothing}{trouble}"

    @staticmethod
    def _models(run: RunDirectory, prefix: str) -> dict[str, Model]:
        found = {}
        for rate in run.learning_rates():
            series = prefix + run.learning_rate_dir(rate).name.removeprefix("lr-")
            for epoch, path in run.checkpoints(rate).items():
                found[f"{series}/epoch-{epoch}"] = Model(path, False, series, epoch)
                if (run.merged(rate, epoch) / "config.json").exists():
                    found[f"{series}/epoch-{epoch}/merged"] = Model(run.merged(rate, epoch), True)
        return found

    def _add_adapter(self, path: Path) -> str:
        """A folder by itself. What it was trained on is told by its configuration, and checked when it is loaded."""
        if not self.base_model:
            raise InputError(f"{path}: an adapter; open the run or the base that it was trained on first")
        name, number = path.name, 2
        while name in self.models and self.models[name].path != path:
            name, number = f"{path.name} ({number})", number + 1
        try:
            trained_on = json.loads((path / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}/adapter_config.json: cannot be read ({error!r})") from error
        self.models[name] = Model(path)
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
        last = {model.series: name for name, model in self.models.items() if model.series}  # epochs are in order
        return ["base", *last.values()] if self.models else []

    def series(self) -> dict[str, dict[int, str]]:
        """The trainings, each with its models by epoch, in order."""
        found: dict[str, dict[int, str]] = {}
        for name, model in self.models.items():
            if model.series:
                found.setdefault(model.series, {})[model.epoch] = name
        return found
