"""The evidence that the ledger judges by: numbers by epoch and by prompt, from a run or a sweep.

A sweep is a folder of run directories, one for each experiment. A single run with two learning rates is read as the
experiments `high` and `low` of one seed. `Evidence.save` writes the same numbers to a file small enough to commit;
`load_evidence` reads a run, a sweep, or such a file. What was not measured is left out; a claim that needs it
names it as missing.
"""

import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain
from pathlib import Path

from mini_symposium.claims.registration import REGISTERED
from mini_symposium.errors import InputError
from mini_symposium.evaluation.best_epoch import load_curves
from mini_symposium.files.reading import refuse_other_shapes
from mini_symposium.files.writing import written_whole
from mini_symposium.recipe import SHIPPED, load_recipe
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
"""The lists in an evaluation (see `evaluation.evaluate`) that the ledger reads, with the keys that each item needs."""

KINDS = {"scale": str, "device": str, "base": dict, "facts": dict, "registration": str, "curves": list}
"""The fields of `Evidence` beside the trainings, and their types."""

SAVED = [each.name for each in fields(Training) if each.compare]
"""The fields of a training that are saved: not its whole recipe, and no path of this machine."""


@dataclass(frozen=True)
class Evidence:
    """What was measured of one model and one dataset, for all claims."""

    scale: str
    device: str
    base: dict
    """Evaluation of the base model without an adapter; {} if it was not evaluated."""
    trained: list[Training]
    facts: dict = field(default_factory=dict)
    """Base model, tokens in all rows, the paper recipe's sequence_len and predicted bytes, the bench on a GPU."""
    registration: str = ""
    """SHA-256 of the registration that all runs began under; "" for none, or if the rows are other ones."""
    curves: list[dict] = field(default_factory=list)
    """Held-out curves with their seeds, see `evaluation.best_epoch.Curve`."""

    @property
    def source(self) -> dict[str, object]:
        """What the parts of one sweep have in common."""
        facts = {key: self.facts.get(key) for key in ("base_model", "tokens")}
        return facts | {"scale": self.scale, "registration": self.registration}

    def named(self, name: str) -> list[Training]:
        """The trainings of experiment `name`, ordered by seed."""
        return sorted((training for training in self.trained if training.name == name), key=lambda t: t.seed)

    def save(self, folder: Path) -> None:
        """Write `folder`/FILE, with a line for each training, so that a diff shows which of them changed.

        Keys that the ledger does not read are left out; the run directories keep them: the answers' texts, how they
        ended, and recitation from a heading or an opening.
        """
        unread = ("answer", "tokens", "stop_reason", "heading_", "opening_")
        content = {key: deepcopy(getattr(self, key)) for key in KINDS}
        trained = [{key: deepcopy(getattr(training, key)) for key in SAVED} for training in self.trained]
        for evaluation in (content["base"], *(e for training in trained for e in training["evaluations"].values())):
            for line in chain(*(evaluation.get(key, ()) for key in EVALUATION)):
                for key in [key for key in line if key.startswith(unread)]:
                    del line[key]
        compact = {"ensure_ascii": False, "separators": (",", ":")}
        lines = ",\n".join(json.dumps(training, **compact) for training in trained)
        head = json.dumps(content, **compact)
        with written_whole(folder / FILE) as temporary:
            temporary.write_text(f'{head[:-1]},"trained":[\n{lines}\n]}}\n', encoding="utf-8")


def load_evidence(*paths: str | Path) -> Evidence:
    """Read a sweep, a run, or a folder that `Evidence.save` wrote; or several, as parts of one sweep.

    What several parts have is taken from the first.

    Raises
    ------
    InputError
        If nothing has been trained there, a file is damaged or of another kind, or the runs of a sweep, or its parts,
        differ in model, data or registration.
    """
    parts = [_load(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        for key, value in part.source.items():
            if value != parts[0].source[key]:
                raise InputError(
                    f"{path}: {key} {value}, but {paths[0]} has {parts[0].source[key]}; judge them one by one"
                )
    if len(parts) == 1:
        return parts[0]
    trained, curves, facts = {}, {}, {}
    with refuse_other_shapes(f"{', '.join(map(str, paths))}: parts that cannot be joined", "judge them one by one"):
        for part in parts:
            facts = part.facts | facts
            for training in part.trained:
                trained.setdefault((training.name, training.seed, training.learning_rate), training)
            for curve in part.curves:
                curves.setdefault((curve["seed"], curve["learning_rate"]), curve)
    # Of the base, what was measured most widely: without answers, what it recites still controls C1.
    base = max((part.base for part in parts), key=lambda base: (len(base.get("answers", ())), len(base)))
    return replace(parts[0], base=base, trained=[*trained.values()], facts=facts, curves=[*curves.values()])


def load_all_evidence(folder: str | Path) -> dict[str, Evidence]:
    """{subfolder: evidence} of a folder of saved evidence, as figures/claims; what began under no registration last."""
    found = {file.parent.name: load_evidence(file.parent) for file in find(folder).glob(f"*/{FILE}")}
    order = [*SHIPPED, *sorted(found)]
    return dict(sorted(found.items(), key=lambda item: (not item[1].registration, order.index(item[0]))))


def _load(path: str | Path) -> Evidence:
    resolved = resolve(path, "evidence", "run", "sweep")
    if resolved.kind == "evidence":
        return _saved(resolved.path / FILE)
    if resolved.kind == "run":
        return _evidence([resolved.run], _measured_trainings(resolved.run), resolved.run.path)
    runs = [RunDirectory(file.parent) for file in sorted(resolved.path.glob("*/recipe.yml"))]
    _check_together(runs)
    return _evidence(runs, [training for run in runs for training in _measured_trainings(run, True)], resolved.path)


def _check_together(runs: list[RunDirectory]) -> None:
    """Refuse runs of different models or data, and a folder whose name has a different seed from its recipe."""
    for run in runs:
        _, named, seed = run.path.name.rpartition("-seed-")
        if named and seed != str(run.recipe.seed):
            raise InputError(
                f"{run.recipe_file}: seed {run.recipe.seed}, but the folder says {seed}; correct one of them"
            )
    sources = [
        {"base_model": run.recipe.base_model, "dataset_sha256": run.environment().get("dataset_sha256")} for run in runs
    ]
    for run, source in zip(runs, sources, strict=True):
        for key, value in source.items():
            if value != sources[0][key]:
                raise InputError(
                    f"{run.path}: {key} {value}, but {runs[0].path} has {sources[0][key]}; "
                    "a ledger is about one model and one dataset: move one of the runs away"
                )


def _reading(file: Path) -> AbstractContextManager:
    """Raise an InputError in this context if a file's values lack the shape that this kit writes."""
    return refuse_other_shapes(f"{file}: not what the ledger reads", "move it away, and measure again")


def _check_evaluation(evaluation: dict, file: Path) -> dict:
    """Return `evaluation`; raise an InputError if it lacks the shape of EVALUATION."""
    with _reading(file):
        for key, shape in EVALUATION.items():
            for line in evaluation[key]:
                if wrong := [name for name, kind in shape.items() if not isinstance(line[name], kind)]:
                    raise TypeError(f"{key} with another {wrong[0]}")
    return evaluation


def _saved(file: Path) -> Evidence:
    with _reading(file):
        content = read_object(file)
        trained = []
        for saved in content.pop("trained"):
            for key in ("twins", "evaluations"):  # by epoch; in JSON every key is text
                saved[key] = {int(epoch): value for epoch, value in saved[key].items()}
            if "recipe" in saved or "run" in saved:  # which `Evidence.save` never writes
                raise TypeError("a training with a recipe or a path")
            trained.append(Training(**saved))
        evidence = Evidence(**content, trained=trained)
        if wrong := [key for key, kind in KINDS.items() if not isinstance(getattr(evidence, key), kind)]:
            raise TypeError(f"{wrong[0]} is a {type(getattr(evidence, wrong[0])).__name__}")
        if infinite := [key for key, v in evidence.facts.items() if isinstance(v, float) and not math.isfinite(v)]:
            raise ValueError(f"{infinite[0]} is not a finite number")
        for evaluation in (evidence.base, *(each for t in trained for each in t.evaluations.values())):
            if evaluation:
                _check_evaluation(evaluation, file)
        return evidence


def _evidence(runs: list[RunDirectory], trained: list[Training], folder: Path) -> Evidence:
    run, base = runs[0], read_evaluation(folder / "base.json")
    recipe = run.recipe
    curves = [{"seed": r.recipe.seed, **asdict(curve)} for r in runs for curve in load_curves(r).values()]
    with _reading(run.path):
        lines = read_jsonl(trained[0].metrics_file) if trained else []
        tokens = sum({line["example"]: line["tokens"] for line in lines}.values())
    facts = {"base_model": recipe.base_model, "tokens": tokens, "sequence_len": load_recipe("paper").sequence_len}
    facts |= _on_a_gpu()
    facts |= {key: base.pop(key) for key in ("paper_bytes", "mistral_tokens") if key in base}
    with _reading(run.environment_file):
        begun = {(r.environment().get("registration"), r.environment()["dataset_sha256"]) for r in runs}
        registration = (
            next(iter(begun))[0] if {rows for _, rows in begun} == {REGISTERED.rows} and len(begun) == 1 else ""
        )
        return Evidence(recipe.scale, run.environment()["device"], base, trained, facts, registration or "", curves)


def _on_a_gpu() -> dict:
    """Memory and time that the bench measured in Mistral-7B's shape; {} if it has not run on a GPU."""
    file = find("figures/bench-cuda.json")
    if not file.is_file():
        return {}
    with _reading(file):
        bench = read_object(file)
        step, ours = bench["step"], "ours, 4 bits"
        measured = {"gpu_peak_bytes": step["peak_bytes"][ours], "gpu_hours": step["600_epochs_hours"][ours]}
        return {**measured, "gpu": bench["environment"]["processor"]}


def read_evaluation(file: Path) -> dict:
    """Read an evaluation; {} if the file is not there, InputError if it holds something else."""
    return _check_evaluation(read_object(file), file) if file.is_file() else {}


def _measured_trainings(run: RunDirectory, in_a_sweep: bool = False) -> list[Training]:
    """The trainings of a run, with what was measured of them, by experiment.

    In a sweep the run's folder names the experiment. In a single run, the highest and the lowest of several rates are
    `high` and `low`; a single rate gets one of these names only if it is in the recipe's contrast.
    """
    rates = run.learning_rates()
    pair = (max(rates), min(rates)) if len(rates) > 1 else run.recipe.contrast
    names = {rate: f"rate-{rate:g}" for rate in rates} | dict(zip(pair, ("high", "low"), strict=True))
    if in_a_sweep:
        names = dict.fromkeys(rates, run.path.name.rpartition("-seed-")[0] or run.path.name)
    trainings = [training for training in run.trainings() if training.metrics_file.is_file()]
    return [_measured(replace(training, name=names[training.learning_rate])) for training in trainings]


def _measured(training: Training) -> Training:
    """`training` with its logged metrics, twin probes and evaluations."""
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
            twins[epoch]["rows"] = [round(line["loss"], 3) for line in sorted(rows, key=lambda line: line["example"])]
    files = RunDirectory(training.run).evaluations(training.learning_rate)
    evaluations = {epoch: read_evaluation(file) for epoch, file in files.items()}
    return replace(training, twins=twins, evaluations=evaluations, **tables)


def _by_epoch(lines: list[Mapping], key: str, n: int) -> list[list[float]]:
    """(epochs, examples): the logged values, rounded to three digits; [] if `key` was not logged.

    An incomplete epoch is left out.
    """
    if not lines or key not in lines[0]:
        return []
    epochs = [lines[start : start + n] for start in range(0, len(lines) - n + 1, n)]
    ordered = [sorted(epoch, key=lambda line: line["example"]) for epoch in epochs]
    return [[line[key] if line[key] is None else round(line[key], 3) for line in epoch] for epoch in ordered]
