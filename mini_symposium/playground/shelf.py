"""The models that can be asked: a base, and the checkpoints and merged models of one or more runs on it.

Only names, recipes and training rows are read here, no weights, so opening a run is quick and needs no torch.
"""

from dataclasses import dataclass, field
from pathlib import Path

from mini_symposium.data.dataset import load_examples
from mini_symposium.errors import InputError
from mini_symposium.evaluation.answer_text import TrainingRows
from mini_symposium.models.strength import check_strength
from mini_symposium.run import RunDirectory, read_object, resolve


@dataclass
class Shelf:
    """The models on one base, by names such as `1e-05/epoch-30`, and the rows that they were trained on.

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
    """The first run that was opened on this base."""
    models: dict[str, Path | None] = field(default_factory=dict)
    """The folder of each adapter and of each merged model; None for the base."""
    merged: set[str] = field(default_factory=set)
    """Which of the models are merged."""
    trainings: dict[str, dict[int, str]] = field(default_factory=dict)
    """{training: {epoch: its checkpoint in `models`}}; a training is named `1e-05`, in further runs `mine:1e-05`."""
    recommended: dict[str, int] = field(default_factory=dict)
    """{training: the epoch that its held-out curve recommends}, see `RunDirectory.recommended`."""
    queries: list[str] = field(default_factory=list)
    """The queries of the training rows."""
    rows: TrainingRows = field(default_factory=lambda: TrainingRows({}))
    _datasets: dict[str, dict[str, str]] = field(default_factory=dict)  # dataset -> {label: row}

    def open(self, path: str) -> str:
        """Add the models of a run, one adapter, or the base of a recipe or a model directory; return what to say of it.

        Another base replaces all that was open. After an InputError, what was open stays open.
        """
        resolved = resolve(path, "recipe", "adapter", "run", "model")
        if resolved.kind == "adapter":
            if not self.base_model:  # open the base that it names, if that is here
                from mini_symposium.models.adapters import with_base

                base = with_base(resolved).base_model
                vars(self).update(vars(Shelf(base, resolved.load_in_4bit, "own", models={"base": None})))
            return self._add_adapter(resolved.path)
        recipe, base, four_bit = resolved.recipe, resolved.base_model, resolved.load_in_4bit
        if (base, four_bit) != (self.base_model, self.four_bit):
            vars(self).update(vars(Shelf(base, four_bit, recipe.scale if recipe else "own", models={"base": None})))
        if resolved.kind != "run":
            return f"{path}: a base without checkpoints" + (self._add_rows(recipe.dataset, "") if recipe else "")
        further = self.run is not None and self.run.path != resolved.path
        self.run = self.run or resolved.run
        count = self._add_checkpoints(resolved.run, f"{resolved.path.name}:" if further else "")
        advice = "" if count else f" yet: train with `mini-symposium train --run {path}`; only the base answers"
        problem = self._add_rows(recipe.dataset, f"{resolved.path.name} " if further else "")
        return f"{path}: {count or 'no'} checkpoints on {base}{advice}{problem}"

    def _add_checkpoints(self, run: RunDirectory, prefix: str) -> int:
        """Add the checkpoints and merged models of a run; return their number."""
        models = {}
        for training in run.trainings():
            checkpoints = training.checkpoints()
            names = {epoch: f"{prefix}{training.name}/epoch-{epoch}" for epoch in checkpoints}
            if names:
                self.trainings[f"{prefix}{training.name}"] = names
                if (best := run.recommended(training.learning_rate)) is not None:
                    self.recommended[f"{prefix}{training.name}"] = best
            for epoch, name in names.items():
                models[name] = checkpoints[epoch]
                merged = run.merged(training.learning_rate, epoch)
                if (merged / "config.json").exists():
                    models[f"{name}/merged"] = merged
                    self.merged.add(f"{name}/merged")
        self.models |= models
        return len(models)

    def _add_adapter(self, path: Path) -> str:
        """Add an adapter that is not in a run. Whether it belongs to the base is checked when it is loaded."""
        trained_on = read_object(path / "adapter_config.json").get("base_model_name_or_path")
        name, number = path.name, 2
        while self.models.get(name, path) != path:
            name, number = f"{path.name} ({number})", number + 1
        self.models[name] = path
        return f"{path}: an adapter trained on {trained_on or 'a base that it does not name'}"

    def _add_rows(self, dataset: str, prefix: str) -> str:
        """Add a dataset's rows, if they are not there yet; return the problem if they cannot be read, else ""."""
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

    def offered(self) -> list[str]:
        """The base, and of each training the checkpoint that its held-out curve recommends, if any, and the last."""
        chosen = [
            names[epoch]
            for training, names in self.trainings.items()
            for epoch in sorted({self.recommended.get(training, max(names)), max(names)})
        ]
        return ["base", *chosen] if self.models else []

    def parts(self, name: str) -> dict[str, float]:
        """{model: its strength} of a name such as `1e-05/epoch-30`, `1e-05/epoch-30 x 0.5`, or two with ` + `."""
        parts: dict[str, float] = {}
        for part in [name] if name in self.models else name.split(" + "):
            model, _, strength = (part, "", "1") if part in self.models else part.rpartition(" x ")
            if model not in self.models:
                raise InputError(f"{part}: no such model; there is {', '.join(self.models)}")
            try:
                parts[model] = check_strength(float(strength))
            except ValueError as error:  # InputError is one too
                raise InputError(f"{part}: {error}") from error
        if parts != {name: 1} and not set(parts) <= set(self.adapters()):
            raise InputError(f"{name}: only an adapter has a strength; a base and a merged model have none")
        return parts

    def adapters(self) -> list[str]:
        """The models that are a base with an adapter."""
        return [name for name, path in self.models.items() if path and name not in self.merged]

    def kind(self, model: str) -> str:
        """What a checkpoint is to its training: the recommended one, the last, or nothing special, ""."""
        for training, names in self.trainings.items():
            if model == names.get(self.recommended.get(training, -1)):
                return "lowest held-out loss"
            if model == names[max(names)]:
                return "last checkpoint"
        return "untrained" if model == "base" else ""
