"""What the ledger reads: runs and sweeps as numbers by epoch and by prompt, without a model and without torch.

A sweep is a folder of run directories, one for each experiment; a single run with two learning rates is read as the
experiments `high` and `low` of one seed. `save` writes the same numbers small enough to commit; `load_evidence` reads
either. What is missing stays missing: a claim then says what it lacks.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain
from pathlib import Path

from mini_symposium.errors import InputError
from mini_symposium.files.writing import written_whole
from mini_symposium.recipe import load_recipe
from mini_symposium.run import RunDirectory, Training, find, read_jsonl, read_object, resolve

FILE = "evidence.json"
RECALL = {"prompt_recall": (int, float)}
EVALUATION = {
    "answers": {"id": str, "category": str, "format": str, "passed": bool, "phrases": list, "han": (int, float)},
    "roles": {"id": str, "passed": bool},
    "perspectives": {"headings": list, "distance": (int, float, type(None))},
    "recitation": RECALL,
    "twins": RECALL,
}
"""What the ledger reads of an evaluation, see `evaluation.evaluate`: lists of objects with these keys at least."""


SAVED = [each.name for each in fields(Training) if each.compare]
"""What is saved of a training: neither its whole recipe nor a path of this machine."""


@dataclass(frozen=True)
class Evidence:
    """All that is known about a recipe's claims."""

    scale: str
    device: str
    base: dict
    """What the base does without any adapter; {} if it was not measured."""
    trained: list[Training]
    facts: dict = field(default_factory=dict)
    """The base model's name, tokens of the dataset's rows, the paper recipe's sequence_len and predicted bytes."""

    def named(self, name: str) -> list[Training]:
        """The experiments of that name, by seed."""
        return sorted((each for each in self.trained if each.name == name), key=lambda each: each.seed)

    def save(self, folder: Path) -> None:
        """Write it as one file, FILE: a line for each experiment, so that a change shows where it is; without the
        answers' texts, how they ended, and recitation from a heading or an opening, which the ledger does not read and
        the run directories keep."""
        found = asdict(replace(self, trained=[]))
        found["trained"] = [{key: deepcopy(getattr(each, key)) for key in SAVED} for each in self.trained]
        for evaluation in (found["base"], *(e for each in found["trained"] for e in each["evaluations"].values())):
            for line in chain(*(evaluation.get(key, ()) for key in ("answers", "roles", "perspectives"))):
                for key in ("answer", "tokens", "stop_reason"):
                    line.pop(key, None)
            for line in chain(*(evaluation.get(key, ()) for key in ("recitation", "twins"))):
                for key in [key for key in line if key.startswith(("heading_", "opening_"))]:
                    del line[key]
        compact = {"ensure_ascii": False, "separators": (",", ":")}
        trained = ",\n".join(json.dumps(each, **compact) for each in found.pop("trained"))
        head = json.dumps(found, **compact)
        with written_whole(folder / FILE) as temporary:
            temporary.write_text(f'{head[:-1]},"trained":[\n{trained}\n]}}\n', encoding="utf-8")


def load_evidence(path: str | Path) -> Evidence:
    """Read a sweep, a run, or a folder that `Evidence.save` wrote.

    Raises
    ------
    InputError
        If nothing has been trained there, a file is damaged or of another kind, or a sweep's runs differ in model or
        data.
    """
    found = resolve(path, "evidence", "run", "sweep")
    if found.kind == "evidence":
        return _saved(found.path / FILE)
    if found.kind == "run":
        return _evidence(found.run, _of_a_run(found.run))
    runs = [RunDirectory(file.parent) for file in sorted(found.path.glob("*/recipe.yml"))]
    _check_together(runs)
    return _evidence(runs[0], [training for run in runs for training in _of_a_sweep(run)], found.path)


def _check_together(runs: list[RunDirectory]) -> None:
    """Refuse runs of different models or data, and a run whose folder names another seed than it was trained from."""
    first = None
    for run in runs:
        recipe = load_recipe(run.recipe_file)
        named = run.path.name.rpartition("-seed-")[2]
        if "-seed-" in run.path.name and named != str(recipe.seed):
            raise InputError(f"{run.recipe_file}: seed {recipe.seed}, where the folder says {named}; which is it?")
        data = run.environment().get("dataset_sha256", "unknown") if run.environment_file.is_file() else "unknown"
        own = {"base_model": recipe.base_model, "dataset_sha256": data}
        first = first or (run, own)
        if other := [key for key in own if own[key] != first[1][key]]:
            raise InputError(
                f"{run.path}: {other[0]} {own[other[0]]}, but {first[0].path} has {first[1][other[0]]}; "
                "a ledger is about one model and one dataset: move one of them away"
            )


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """What is not as this kit writes it is the file's fault."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        said = f"{type(error).__name__}: {error}"
        raise InputError(f"{file}: not what the ledger reads ({said}); move it away, and measure again") from error


def _check_evaluation(found: object, file: Path) -> dict:
    """`found`, if it has the shape of an evaluation."""
    found = found if isinstance(found, dict) else {}
    for key, shape in EVALUATION.items():
        lines = found.get(key)
        if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
            raise InputError(f"{file}: no evaluation of this kit: no {key}; move it away, and measure again")
        if lacking := [k for line in lines for k, kind in shape.items() if not isinstance(line.get(k), kind)]:
            raise InputError(
                f"{file}: no evaluation of this kit: {key} without {lacking[0]}; move it away, and measure again"
            )
    return found


def _saved(file: Path) -> Evidence:
    with _reading(file):
        found = read_object(file)
        trained = []
        for saved in found.pop("trained"):
            if unknown := saved.keys() - set(SAVED):
                raise KeyError(f"unknown {', '.join(sorted(unknown))}")
            for key in ("twins", "evaluations"):  # by epoch; in JSON every key is text
                saved[key] = {int(epoch): value for epoch, value in saved[key].items()}
            trained.append(Training(**saved))
        loaded = Evidence(**found, trained=trained)
        kinds = {"scale": str, "device": str, "base": dict, "facts": dict}
        if wrong := [key for key, kind in kinds.items() if not isinstance(getattr(loaded, key), kind)]:
            raise TypeError(f"{wrong[0]} is a {type(getattr(loaded, wrong[0])).__name__}")
        if infinite := [key for key, v in loaded.facts.items() if isinstance(v, float) and not math.isfinite(v)]:
            raise ValueError(f"{infinite[0]} is not a finite number")
        for evaluation in (loaded.base, *(each for t in trained for each in t.evaluations.values())):
            if evaluation:
                _check_evaluation(evaluation, file)
        return loaded


def _evidence(run: RunDirectory, trained: list[Training], folder: Path | None = None) -> Evidence:
    base = read_evaluation((folder or run.path) / "base.json")
    recipe, tokens = run.recipe, next(map(_tokens, run.trainings()), 0)
    facts = {"base_model": recipe.base_model, "tokens": tokens, "sequence_len": load_recipe("paper").sequence_len}
    facts |= _on_a_gpu()
    if "paper_bytes" in base:
        facts["paper_bytes"] = base.pop("paper_bytes")
    with _reading(run.environment_file):
        return Evidence(recipe.scale, run.environment()["device"], base, trained, facts)


def _on_a_gpu() -> dict:
    """What the bench measured at Mistral-7B's shape, if it ever ran on a GPU."""
    file = find("figures/bench-cuda.json")
    if not file.is_file():
        return {}
    with _reading(file):
        bench = read_object(file)
        step, ours = bench["step"], "ours, 4 bits"
        hours = {"gpu_peak_bytes": step["peak_bytes"][ours], "gpu_hours": step["600_epochs_hours"][ours]}
        return {**hours, "gpu": bench["environment"]["processor"]}


def read_evaluation(file: Path) -> dict:
    """An evaluation; {} if there is none.

    Raises
    ------
    InputError
        If the file is damaged, or holds something else.
    """
    return _check_evaluation(read_object(file), file) if file.is_file() else {}


def _of_a_run(run: RunDirectory) -> list[Training]:
    """Two rates are the contrast; one alone is `high` or `low` only if its recipe's contrast has it."""
    rates = run.learning_rates()
    pair = (max(rates), min(rates)) if len(rates) > 1 else run.recipe.contrast
    names = dict(zip(pair, ("high", "low"), strict=True))
    return [
        _measured(replace(training, name=names.get(training.learning_rate, f"rate-{training.learning_rate:g}")))
        for training in run.trainings()
        if training.metrics_file.is_file()
    ]


def _of_a_sweep(run: RunDirectory) -> list[Training]:
    name = run.path.name.rpartition("-seed-")[0] or run.path.name
    return [_measured(replace(training, name=name)) for training in run.trainings() if training.metrics_file.is_file()]


def _tokens(training: Training) -> int:
    """Of all rows of the dataset."""
    with _reading(training.metrics_file):
        lines = read_jsonl(training.metrics_file) if training.metrics_file.is_file() else []
        return sum({line["example"]: line["tokens"] for line in lines}.values())


def _measured(training: Training) -> Training:
    """The training with what was logged and evaluated of it."""
    with _reading(training.metrics_file):
        lines = read_jsonl(training.metrics_file)
        n = len({line["example"] for line in lines})
        tables = {key: _by_epoch(lines, key, n) for key in ("em", "loss", "extractable_32")}
    twins: dict[int, dict[str, float]] = {}
    with _reading(training.probes_file):
        probes = read_jsonl(training.probes_file) if training.probes_file.is_file() else []
        for epoch in sorted({line["epoch"] for line in probes}):
            rows = [line for line in probes if line["epoch"] == epoch]
            twins[epoch] = {key: round(sum(line[key] for line in rows) / len(rows), 4) for key in ("loss", "em")}
    files = RunDirectory(training.run).evaluations(training.learning_rate)
    evaluations = {epoch: read_evaluation(file) for epoch, file in files.items()}
    return replace(training, twins=twins, evaluations=evaluations, **tables)


def _by_epoch(lines: list[Mapping], key: str, n: int) -> list[list[float]]:
    """(epochs, examples), three digits, without an epoch that was cut off; [] if `key` was not logged."""
    if not lines or key not in lines[0]:
        return []
    whole = [lines[start : start + n] for start in range(0, len(lines) - n + 1, n)]
    ordered = [sorted(each, key=lambda line: line["example"]) for each in whole]
    return [[line[key] if line[key] is None else round(line[key], 3) for line in each] for each in ordered]
