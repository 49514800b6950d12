"""The run directory: everything about a run in one place, so that a figure can always be traced to its steps.

Files are written atomically (see `files.writing`); nothing that exists is overwritten unless asked; and the record
names the recipe, machine and commit.

`Training` is one adapter's training in such a directory. `resolve` turns what a user typed into a run, a model
directory or a recipe, for every command and notebook.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from mini_symposium import __version__
from mini_symposium.errors import InputError
from mini_symposium.files.reading import parse_json, path_of, read_text, refuse_other_shapes
from mini_symposium.files.writing import discard, write_json, written_whole
from mini_symposium.recipe import KEYS, SHIPPED, Recipe, load_recipe

CHECKOUT = Path(__file__).resolve().parents[1]
ROOT = CHECKOUT if (CHECKOUT / "notebooks").is_dir() else Path(__file__).resolve().parent / "shipped"
"""Where data/, notebooks/ and figures/ lie: beside the package in a checkout, inside it if it was installed."""

REGISTRATION = ROOT / "data" / "registration.yml"
"""What the ledger asks, see `claims.registration`; a run records its SHA-256 when it begins."""

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "papermill")
"""Whose versions a run records."""


def standing() -> Path:
    """The folder that relative paths start from: the current one; in the kit's own notebooks/, the folder above it."""
    here = Path.cwd()
    return ROOT if here.resolve().is_relative_to(ROOT / "notebooks") else here


def find(path: str | Path) -> Path:
    """The path as given, relative to the current folder; what ships with the kit is found from anywhere."""
    path = path_of(path)
    if path.is_absolute() or path.exists():
        return path
    if path.parts[:1] in (("data",), ("figures",)) and (ROOT / path).exists():
        return ROOT / path
    return path if standing() == Path.cwd() else standing() / path


def read_jsonl(path: str | Path) -> list[dict]:
    """Rows of a JSON Lines file that the kit appends to; a last line that a crash cut short is left out."""
    rows = []
    for number, line in enumerate(read_text(Path(path)).split("\n")[:-1], start=1):
        try:
            row = parse_json(line, path, number)
        except InputError as error:
            raise InputError(f"{error}: a damaged line; train that learning rate again") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: a damaged line, {line[:40]!r}; train that learning rate again")
        rows.append(row)
    return rows


def whole_lines(path: Path) -> list[dict]:
    """The steps of a log before the first line that is missing or damaged; [] without a log."""
    lines, step = [], 0
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        try:
            row = parse_json(line.decode(), path)
        except ValueError:
            break
        if not isinstance(row, dict) or row.get("step") not in (step, step + 1):
            break
        lines.append(row)
        step = row["step"]
    return lines


def read_object(path: Path) -> dict:
    """A JSON file that the kit wrote and that holds an object, such as results.json; InputError if it does not."""
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, not an object; move it away")
    return value


def overwrite_once(note: Path, request: dict, delete_old: Callable[[], object]) -> None:
    """Call `delete_old` and write `request` to `note`, unless `note` holds it already.

    So if a command with --overwrite is interrupted and run again, the second run does not delete what the first one
    made. The caller deletes `note` at the end.
    """
    try:
        begun = note.is_file() and read_object(note) == json.loads(json.dumps(request))
    except InputError:
        begun = False
    if not begun:
        delete_old()
        write_json(note, request)


def sha256_of_text(file: Path) -> str:
    """The SHA-256 of a text file, with line ends as on Linux, so that it is the same in every checkout."""
    return hashlib.sha256(file.read_bytes().replace(b"\r\n", b"\n")).hexdigest()


def environment(**more) -> dict:
    """What a run ran on: versions, platform, cores, the commit of the checkout, the registration, and `more`."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = ""
    with suppress(FileNotFoundError):  # an installed package has no commit, and a machine may have no git
        commit = subprocess.run(describe, capture_output=True, text=True).stdout if ROOT == CHECKOUT else ""
    return {
        "mini_symposium": __version__,
        "commit": commit.strip() or None,
        "registration": sha256_of_text(REGISTRATION),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    }


def rate_folder(learning_rate: float) -> str:
    """The folder of a learning rate, in the shortest scientific notation, so that its name parses back exactly.

    >>> rate_folder(1e-5)
    'lr-1e-05'
    """
    mantissa, exponent = f"{learning_rate:.15e}".split("e")
    return f"lr-{mantissa.rstrip('0').rstrip('.')}e{exponent}"


def rate_and_epoch(checkpoint: Path) -> tuple[float, int]:
    """The learning rate and the epoch in a checkpoint's path.

    >>> rate_and_epoch(Path("runs/proxy/lr-1e-05/checkpoints/epoch-0030"))
    (1e-05, 30)
    """
    return float(checkpoint.parents[1].name.removeprefix("lr-")), int(checkpoint.name.removeprefix("epoch-"))


@dataclass(frozen=True)
class Training:
    """One adapter's training, from the plan to the ledger: what is trained, where it lies, and what was measured.

    Planned from a recipe (`Training.of`), trained into its folder by `training.finetune`, and read back with its
    measurements by `claims.evidence`. One from saved evidence has no recipe and no run directory.
    """

    name: str
    """The experiment's name in a sweep, as `high`; the learning rate in a plain run, as `1e-05`."""
    seed: int
    learning_rate: float
    lora_r: int
    lora_alpha: int
    lr_scheduler: str
    num_epochs: int
    """The planned number of epochs."""
    em: list[list[float]] = field(default_factory=list)
    """By epoch and example, before the step that trained on it: exact memorization, see `memorization.em_and_es`."""
    loss: list[list[float]] = field(default_factory=list)
    """By epoch and example, before the step that trained on it: loss in nats a token."""
    extractable_32: list[list[bool | None]] = field(default_factory=list)
    """By epoch and example, see `memorization.extraction`; [] where only part of a row is supervised."""
    twins: dict[int, dict[str, float]] = field(default_factory=dict)
    """{epoch: {"loss", "em", "rows"}}: means over rows that were not trained on, and the loss of each."""
    evaluations: dict[int, dict] = field(default_factory=dict)
    """{epoch: what `evaluation.evaluate` measured}."""
    left_out: tuple[int, ...] = field(default=(), compare=False)
    """Examples of the dataset that are not trained on, by index."""
    recipe: Recipe | None = field(default=None, compare=False, repr=False)
    """The whole recipe, learning rate included."""
    run: Path | None = field(default=None, compare=False)
    """The run directory; only a name until `below` is called."""

    @classmethod
    def of(cls, recipe: Recipe, run: Path, name: str = "", left_out: tuple[int, ...] = ()) -> "Training":
        """The training of `recipe` in the directory `run`.

        >>> Training.of(load_recipe("proxy"), Path("runs/mine")).folder.as_posix()
        'runs/mine/lr-1e-05'
        """
        own = {key: getattr(recipe, key) for key in cls.__dataclass_fields__ if key in KEYS}
        name = name or rate_folder(recipe.learning_rate).removeprefix("lr-")
        return cls(name=name, **own, left_out=left_out, recipe=recipe, run=run)

    def below(self, root: Path) -> "Training":
        """The same training with its run directory in the folder `root`."""
        return replace(self, run=root / self.run)

    @property
    def epochs(self) -> int:
        """Whole epochs that were logged."""
        return len(self.em)

    @property
    def steps_per_epoch(self) -> int:
        """Examples, at batch 1."""
        return len(self.loss[0]) if self.loss else 0

    @property
    def folder(self) -> Path:
        """Where it is trained: RUN/lr-1e-05."""
        return self.run / rate_folder(self.learning_rate)

    @property
    def metrics_file(self) -> Path:
        """A line per optimizer step, see `RunDirectory.metrics`."""
        return self.folder / "metrics.jsonl"

    @property
    def probes_file(self) -> Path:
        """A line per probed epoch and held-out example, see `RunDirectory.probes`."""
        return self.folder / "probes.jsonl"

    def checkpoint(self, epoch: int) -> Path:
        return self.folder / "checkpoints" / f"epoch-{epoch:04d}"

    def checkpoints(self) -> dict[int, Path]:
        """Epoch -> checkpoint folder, in order of epochs. Folders that are still being written have other names."""
        return _by_epoch(self.folder.glob("checkpoints/epoch-*"))


def _by_epoch(paths: Iterable[Path]) -> dict[int, Path]:
    """{epoch: path} of paths named epoch-N or epoch-N.json, sorted."""
    found = ((re.fullmatch(r"epoch-(\d+)(\.json)?", path.name), path) for path in paths)
    return dict(sorted((int(name[1]), path) for name, path in found if name and path.is_dir() != bool(name[2])))


class RunDirectory:
    """Paths in a run directory. Creating this object touches no file."""

    def __init__(self, path: str | Path):
        path = find(path)
        self.path = path = path if path.exists() else path.absolute()
        self.recipe_file, self.environment_file = path / "recipe.yml", path / "environment.json"
        self.figures, self.notebooks = path / "figures", path / "notebooks"
        self.curve_file, self.folds = path / "curve.json", path / "folds"
        self.influence_file = path / "influence.json"

    def environment(self) -> dict:
        """What the run ran on, and the most memory that its training took."""
        return read_object(self.environment_file)

    @property
    def recipe(self) -> Recipe:
        """What was trained here; its learning rate is the lower one of its `contrast`."""
        return load_recipe(self.recipe_file)

    def learning_rate_dir(self, learning_rate: float) -> Path:
        """The folder of one training, `lr-1e-05`."""
        return self.path / rate_folder(learning_rate)

    def trainings(self) -> list[Training]:
        """The trainings that lie here, finished or not, highest learning rate first."""
        recipe = self.recipe if (rates := self.learning_rates()) else None
        return [Training.of(recipe.replace(learning_rate=rate), self.path) for rate in rates]

    def learning_rates(self) -> list[float]:
        """Learning rates with a finished or unfinished training, highest first."""
        folders = (folder.name for folder in self.path.glob("lr-*") if folder.is_dir())
        found = (re.fullmatch(r"lr-(\d+(?:\.\d+)?e[+-]\d+)", name) for name in folders)
        return sorted((float(name[1]) for name in found if name), reverse=True)

    def probes(self, learning_rate: float) -> list[dict]:
        """One line per probed epoch and held-out example: epoch, example, loss, em, es, tokens, and what
        `memorization.extraction` returns; [] without a probe."""
        path = self.learning_rate_dir(learning_rate) / "probes.jsonl"
        return read_jsonl(path) if path.is_file() else []

    def metrics(self, learning_rate: float) -> list[dict]:
        """One line per optimizer step: step, epoch, example, learning_rate, loss, em, es, grad_norm, tokens, seconds.

        Loss, em and es (see `memorization`) are those of the step's example before its update; so is what
        `memorization.extraction` returns, where all of a row is supervised.
        """
        path = self.learning_rate_dir(learning_rate) / "metrics.jsonl"
        if not path.is_file():
            raise InputError(f"{path}: not there; run notebook 02 or `mini-symposium train --run {self.path}` first")
        return read_jsonl(path)

    def final_loss(self, learning_rate: float, n_examples: int, steps: int | None = None) -> float:
        """Mean training loss over the last epoch of `steps`, in nats a token; of the whole run if None."""
        losses = [line["loss"] for line in self.metrics(learning_rate)[:steps][-n_examples:]]
        return sum(losses) / len(losses)

    def checkpoints(self, learning_rate: float) -> dict[int, Path]:
        """Epoch -> checkpoint folder, in order of epochs. Folders that are still being written have other names."""
        return _by_epoch(self.learning_rate_dir(learning_rate).glob("checkpoints/epoch-*"))

    def recommended(self, learning_rate: float) -> int | None:
        """The epoch to take by held-out loss, see `evaluation.best_epoch`; None if it is not known or was not kept."""
        if not self.curve_file.is_file():
            return None
        with refuse_other_shapes(f"{self.curve_file}: not curves that this kit wrote", "move it away"):
            found = read_object(self.curve_file)["recommended"]
            epochs = [each["epoch"] for each in found if each["learning_rate"] == learning_rate and each["turned"]]
        return epochs[0] if epochs and epochs[0] in self.checkpoints(learning_rate) else None

    def evaluations(self, learning_rate: float) -> dict[int, Path]:
        """Epoch -> file with what was measured of that checkpoint, see `evaluation.evaluate`."""
        return _by_epoch(self.learning_rate_dir(learning_rate).glob("evaluations/epoch-*.json"))

    @staticmethod
    def evaluation_file(checkpoint: Path) -> Path:
        return checkpoint.parents[1] / "evaluations" / f"{checkpoint.name}.json"

    def newest_checkpoints(self) -> dict[str, Path]:
        """The last checkpoint of each learning rate, highest rate first, under a name like `1e-05`."""
        kept = {rate_folder(rate).removeprefix("lr-"): self.checkpoints(rate) for rate in self.learning_rates()}
        return {name: found[max(found)] for name, found in kept.items() if found}

    def offered_checkpoints(self) -> dict[str, Path]:
        """As `newest_checkpoints`, but with the recommended epoch of a learning rate where there is one."""
        found = self.newest_checkpoints()
        return {name: self.checkpoints(float(name)).get(self.recommended(float(name)), found[name]) for name in found}

    def intermediate_epochs(self, learning_rate: float) -> list[int]:
        """The epochs with a checkpoint nearest to one third and to two thirds of the run, but not its first or last."""
        *earlier, last = self.checkpoints(learning_rate) or [0]
        earlier = [epoch for epoch in earlier if epoch]
        nearest = [min(earlier, key=lambda epoch: abs(epoch - last * part / 3)) for part in (1, 2) if earlier]
        return sorted(set(nearest))

    def dose_control(self) -> dict[str, Path]:
        """{name: the highest rate's checkpoint at the dose with which the lowest rate's run ends}; {} if that epoch was
        not kept."""
        rates = self.learning_rates()
        high, low = (self.checkpoints(rate) for rate in (max(rates), min(rates))) if len(rates) > 1 else ({}, {})
        epoch = round(max(low, default=0) * min(rates, default=0) / max(rates, default=1))
        return {f"dose control, epoch {epoch}": high[epoch]} if epoch and epoch in high else {}

    def merged(self, learning_rate: float, epoch: int) -> Path:
        return self.learning_rate_dir(learning_rate) / "merged" / f"epoch-{epoch:04d}"

    def survival_file(self, learning_rate: float, epoch: int) -> Path:
        """Where `mini-symposium survival` writes what it measured of that checkpoint."""
        return self.learning_rate_dir(learning_rate) / "survival" / f"epoch-{epoch:04d}.json"

    def record_recipe(self, recipe: Recipe, dataset_sha256: str, hardware: str) -> bool:
        """Record what is trained here, and on what; return True if the run had no record yet.

        InputError if it records another recipe or another dataset.
        """
        if not self.recipe_file.exists():
            found = environment(device=hardware, seed=recipe.seed, dataset_sha256=dataset_sha256)
            write_json(self.environment_file, found)
            with written_whole(self.recipe_file) as temporary:
                temporary.write_text(recipe.to_yaml(), encoding="utf-8")
            return True
        kept = self.recipe
        if differing := [key for key in KEYS if getattr(kept, key) != getattr(recipe, key)]:
            raise InputError(
                f"{self.recipe_file}: this run was made with another {', '.join(differing)}; "
                "choose another run directory, or pass --overwrite"
            )
        if self.environment().get("dataset_sha256") != dataset_sha256:
            raise InputError(
                f"{self.path}: this run was made from other examples; choose another run, or pass --overwrite"
            )
        return False

    def clear_training(self, made_from: dict | None = None) -> None:
        """Delete what was trained here, with its recipe; figures and executed notebooks stay.

        Held-out curves go too, unless they were made from `made_from`.
        """
        kept = self.curve_file.is_file() and read_object(self.curve_file).get("made_from") == made_from
        for folder in (*self.path.glob("lr-*"), *([self.folds] if self.folds.exists() and not kept else [])):
            discard(folder)
        if not kept:
            self.curve_file.unlink(missing_ok=True)
        for name in ("recipe.yml", "environment.json", "base.json"):
            (self.path / name).unlink(missing_ok=True)

    def results(self) -> dict:
        """What the notebooks recorded, by notebook; {} before the first."""
        path = self.path / "results.json"
        return read_object(path) if path.is_file() else {}

    def record(self, notebook: str, values: dict) -> None:
        """Put one notebook's results into results.json, leaving the other notebooks' as they are."""
        write_json(self.path / "results.json", dict(sorted({**self.results(), notebook: values}.items())))


@dataclass(frozen=True)
class Resolved:
    """The folder that a user named, and the recipe that goes with it."""

    kind: str
    """recipe, adapter, run, model, evidence or sweep; see `KINDS`."""
    path: Path
    recipe: Recipe | None = None
    """A recipe itself, or that of a run."""
    checkpoints: dict[Path, float] = field(default_factory=dict)
    """A run's chosen checkpoints, each with its weight; see `adapters.find_checkpoints`. Of an adapter, itself."""
    base: str = ""
    """The base of an adapter that no run trained; see `adapters.with_base`."""

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.path)

    @property
    def base_model(self) -> str:
        """The base of the recipe or the adapter, or the model directory itself."""
        return self.recipe.base_model if self.recipe else self.base or str(self.path)

    @property
    def trained_base(self) -> str:
        """The base to merge onto: "nf4", which a run's training saw; "original" for an adapter from elsewhere."""
        return "original" if self.kind == "adapter" else "nf4"

    @property
    def load_in_4bit(self) -> bool:
        """A recipe's base is loaded in 4 bits, as in training; a model directory, or an adapter's base, as it is."""
        return self.kind not in ("model", "adapter")


KINDS = {
    "recipe": f"one of {', '.join(SHIPPED)} or a recipe's .yml",
    "evidence": "a folder with evidence.json",
    "adapter": "a folder with an adapter (adapter_config.json)",
    "run": "a run directory (recipe.yml)",
    "model": "a model directory (config.json)",
    "sweep": "a sweep, that is a folder of run directories",
}
"""What can be typed, in order of lookup, with the words for errors."""


def resolve(typed: str | Path, *kinds: str) -> Resolved:
    """The run, model, recipe, ... that `typed` names, of one of `kinds`, which are keys of KINDS; else InputError.

    >>> resolve("proxy", "recipe", "run").base_model
    'SmolLM2-135M-Instruct'
    """
    path = RunDirectory(typed).path
    shipped = str(typed) in SHIPPED
    there = {
        "recipe": shipped or path.is_file(),
        "evidence": (path / "evidence.json").is_file(),
        "adapter": (adapter := _adapter_in(path)) is not None,
        "run": (path / "recipe.yml").exists(),
        "model": (path / "config.json").exists(),
        "sweep": any(path.glob("*/recipe.yml")),
    }
    kind = next((kind for kind in KINDS if kind in kinds and there[kind]), None)
    if kind == "recipe":
        return Resolved(kind, path, load_recipe(typed))
    if kind is None:
        *first, last = [KINDS[kind] for kind in KINDS if kind in kinds]
        raise InputError(f"{typed}: not {' or '.join([', '.join(first), last] if first else [last])}")
    if kind == "adapter":
        return Resolved(kind, adapter, checkpoints={adapter: 1.0})
    return Resolved(kind, path, load_recipe(path / "recipe.yml") if kind == "run" else None)


def _adapter_in(folder: Path) -> Path | None:
    """The folder itself if it holds an adapter, else the newest checkpoint-N in it that does, as Trainer names it."""
    inside = [path.parent for path in folder.glob("checkpoint-*/adapter_config.json")]
    inside.sort(key=lambda path: (len(path.name), path.name))
    return folder if (folder / "adapter_config.json").exists() else inside[-1] if inside else None


def open_run(path: str | Path) -> RunDirectory:
    """The run directory at `path`; InputError if there is no recipe.yml in it, or it is damaged."""
    return resolve(path, "run").run
