"""One directory holds everything about a run, so that a figure can always be traced to its steps.

The rules: a file is there whole or not at all (see `writing`); nothing that exists is overwritten unless asked;
and what is recorded says which recipe, machine and commit it came from.
"""

import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from mini_symposium import __version__
from mini_symposium.errors import InputError
from mini_symposium.files.reading import parse_json, path_of, read_text
from mini_symposium.files.writing import discard, write_json

ROOT = Path(__file__).resolve().parents[1]
"""The checkout: `data/`, `notebooks/` and `figures/` lie beside the package."""

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "papermill")


def find(path: str | Path) -> Path:
    """The path as given if it exists, else below the checkout; so notebooks run from any directory.

    >>> find("data/minisymposium.md").name
    'minisymposium.md'
    """
    path = path_of(path)
    return path if path.is_absolute() or path.exists() else ROOT / path


def read_jsonl(path: str | Path) -> list[dict]:
    """Rows of a JSON-lines file that we append to; a last line cut by a crash is left out.

    Raises
    ------
    InputError
        If the file cannot be read, or another line is damaged.
    """
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
    """The steps of a log up to the first line that is missing or damaged; [] without a log."""
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
    """A JSON file of ours that holds an object, such as results.json; InputError if it does not."""
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, not an object; move it away")
    return value


def said_already(file: Path, what: dict) -> bool:
    """Whether `file` holds just that; not, if it cannot be read."""
    try:
        return file.is_file() and read_object(file) == json.loads(json.dumps(what))
    except InputError:
        return False


def environment(**more) -> dict:
    """What a run ran on: versions, platform, cores, the commit of the checkout, and `more`."""
    git = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True
    )
    return {
        "mini_symposium": __version__,
        "commit": git.stdout.strip() or None,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    }


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Epoch -> checkpoint folder, in order of epochs."""
    found = ((re.fullmatch(r"epoch-(\d+)", path.name), path) for path in folder.glob("epoch-*") if path.is_dir())
    return dict(sorted((int(name[1]), path) for name, path in found if name))


class RunDirectory:
    """Names for what lies in a run directory. Making one touches nothing on disk.

    >>> RunDirectory("runs/proxy").learning_rate_dir(1e-5).name
    'lr-1e-05'
    """

    def __init__(self, path: str | Path):
        path = path_of(path)
        self.path = (
            path
            if path.is_absolute() or path.exists()
            else ROOT / path
            if path.parts[:1] == ("runs",)
            else path.absolute()
        )

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yml"

    @property
    def environment_file(self) -> Path:
        return self.path / "environment.json"

    def environment(self) -> dict:
        """What the run ran on, and the most memory that its training took."""
        return read_object(self.environment_file)

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def notebooks(self) -> Path:
        return self.path / "notebooks"

    def learning_rate_dir(self, learning_rate: float) -> Path:
        """`lr-1e-05`: the shortest scientific notation, so that a folder's name parses back exactly."""
        mantissa, exponent = f"{learning_rate:.15e}".split("e")
        return self.path / f"lr-{mantissa.rstrip('0').rstrip('.')}e{exponent}"

    def learning_rates(self) -> list[float]:
        """Learning rates with a finished or unfinished training, highest first."""
        folders = (folder.name for folder in self.path.glob("lr-*") if folder.is_dir())
        found = (re.fullmatch(r"lr-(\d+(?:\.\d+)?e[+-]\d+)", name) for name in folders)
        return sorted((float(name[1]) for name in found if name), reverse=True)

    def probes(self, learning_rate: float) -> list[dict]:
        """The line per probed epoch and held-out example: epoch, example, loss, em, es, tokens, and what
        `memorization.unsaid` says; [] without a probe."""
        path = self.learning_rate_dir(learning_rate) / "probes.jsonl"
        return read_jsonl(path) if path.is_file() else []

    def metrics(self, learning_rate: float) -> list[dict]:
        """The line per optimizer step: step, epoch, example, learning_rate, loss, em, es, grad_norm, tokens, seconds.

        Loss, em and es (see `memorization`) are those of the step's example before its update; so is what
        `memorization.unsaid` says, where all of a row is supervised.

        Raises
        ------
        InputError
            If nothing has been trained here at that rate.
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
        """Epoch -> checkpoint folder, in order of epochs. Folders still being written have other names."""
        return checkpoints_in(self.learning_rate_dir(learning_rate) / "checkpoints")

    def evaluations(self, learning_rate: float) -> dict[int, Path]:
        """Epoch -> what was measured of that checkpoint's behaviour, see `evaluation.evaluate`."""
        folder = self.learning_rate_dir(learning_rate) / "evaluations"
        numbers = {path: path.stem.removeprefix("epoch-") for path in sorted(folder.glob("epoch-*.json"))}
        return {int(number): path for path, number in numbers.items() if number.isdecimal()}

    @staticmethod
    def evaluation_file(checkpoint: Path) -> Path:
        """Where what was measured of a checkpoint's behaviour goes."""
        return checkpoint.parents[1] / "evaluations" / f"{checkpoint.name}.json"

    def newest_checkpoints(self) -> dict[str, Path]:
        """The last checkpoint of each learning rate, highest rate first, under a name like `1e-05`."""
        rates = {rate: self.checkpoints(rate) for rate in self.learning_rates()}
        return {
            self.learning_rate_dir(r).name.removeprefix("lr-"): found[max(found)] for r, found in rates.items() if found
        }

    def on_the_way(self, learning_rate: float) -> list[int]:
        """The epochs nearest to a third and two thirds of the way whose checkpoints were kept, if any lie between."""
        *earlier, last = self.checkpoints(learning_rate) or [0]
        earlier = [epoch for epoch in earlier if epoch]
        nearest = [min(earlier, key=lambda epoch: abs(epoch - last * part / 3)) for part in (1, 2) if earlier]
        return sorted(set(nearest))

    def dose_control(self) -> dict[str, Path]:
        """The highest rate's checkpoint at the dose at which the lowest one's run ends, under a name of its own; {} if
        that epoch was not kept."""
        rates = self.learning_rates()
        high, low = (self.checkpoints(rate) for rate in (max(rates), min(rates))) if len(rates) > 1 else ({}, {})
        epoch = round(max(low, default=0) * min(rates, default=0) / max(rates, default=1))
        return {f"dose control, epoch {epoch}": high[epoch]} if epoch and epoch in high else {}

    def merged(self, learning_rate: float, epoch: int) -> Path:
        """Where the merge of that checkpoint goes."""
        return self.learning_rate_dir(learning_rate) / "merged" / f"epoch-{epoch:04d}"

    def survival_file(self, learning_rate: float, epoch: int) -> Path:
        """Where `mini-symposium survival` writes what it measured of that checkpoint."""
        return self.learning_rate_dir(learning_rate) / "survival" / f"epoch-{epoch:04d}.json"

    def clear_training(self) -> None:
        """Forget what was trained here, with its recipe; figures and executed notebooks stay."""
        for folder in self.path.glob("lr-*"):
            discard(folder)
        for name in ("recipe.yml", "environment.json", "base.json"):
            (self.path / name).unlink(missing_ok=True)

    def results(self) -> dict:
        """What the notebooks recorded, by notebook; {} before the first."""
        path = self.path / "results.json"
        return read_object(path) if path.is_file() else {}

    def record(self, notebook: str, values: dict) -> None:
        """Put one notebook's results into results.json, leaving the other notebooks' as they are."""
        write_json(self.path / "results.json", dict(sorted({**self.results(), notebook: values}.items())))
