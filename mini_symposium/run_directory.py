"""One directory holds everything about a run, so that a figure can always be traced to its steps.

The rules: a file is written under a temporary name and renamed, so that a reader
never meets half of one; nothing that exists is overwritten unless asked; and what
is recorded says which recipe, machine and commit it came from.
"""

import json
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from mini_symposium import InputError, __version__

ROOT = Path(__file__).resolve().parents[1]
"""The checkout: `data/`, `notebooks/` and `figures/` lie beside the package."""

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "papermill")


def find(path: str | Path) -> Path:
    """The path as given if it exists, else below the checkout; so notebooks run from any directory.

    >>> find("data/minisymposium.md").name
    'minisymposium.md'
    """
    path = Path(path).expanduser()
    return path if path.is_absolute() or path.exists() else ROOT / path


@contextmanager
def written_whole(path: str | Path):
    """Yield a temporary sibling of `path` to write to; rename it into place if nothing went wrong.

    Works for a file and for a directory (the body then makes the directory itself).

    Raises
    ------
    InputError
        If the disk is full or the directory cannot be written. `path` is as it was.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)) / path.name
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another --run"
        ) from error
    finally:
        if temporary is not None:
            _remove(temporary.parent)


def _remove(path: Path) -> None:
    for below in sorted(path.rglob("*"), reverse=True):
        below.rmdir() if below.is_dir() and not below.is_symlink() else below.unlink()
    path.rmdir()


def write_json(path: str | Path, value) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_jsonl(path: str | Path) -> list[dict]:
    """Rows of a JSON-lines file that we append to; a last line cut by a crash is left out."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}:{number}: a damaged line ({error.msg}); train that learning rate again"
            ) from error
    return rows


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


class RunDirectory:
    """Names for what lies in a run directory. Making one touches nothing on disk.

    >>> RunDirectory("runs/proxy").learning_rate_dir(1e-5).name
    'lr-1e-05'
    """

    def __init__(self, path: str | Path):
        path = Path(path).expanduser()
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
        return json.loads(self.environment_file.read_text(encoding="utf-8"))

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
        found = (folder.name.removeprefix("lr-") for folder in self.path.glob("lr-*") if folder.is_dir())
        return sorted(map(float, found), reverse=True)

    def probes(self, learning_rate: float) -> list[dict]:
        """The line per probed epoch and held-out example: epoch, example, loss, em, es, tokens; [] without a probe."""
        path = self.learning_rate_dir(learning_rate) / "probes.jsonl"
        return read_jsonl(path) if path.is_file() else []

    def metrics(self, learning_rate: float) -> list[dict]:
        """The line per optimizer step: step, epoch, example, learning_rate, loss, em, es, grad_norm, tokens, seconds.

        Loss, em and es (see `memorization`) are those of the step's example before its update.

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
        folder = self.learning_rate_dir(learning_rate) / "checkpoints"
        return {int(path.name.removeprefix("epoch-")): path for path in sorted(folder.glob("epoch-*"))}

    def evaluations(self, learning_rate: float) -> dict[int, Path]:
        """Epoch -> what was measured of that checkpoint's behaviour, see `evaluation.evaluate`."""
        folder = self.learning_rate_dir(learning_rate) / "evaluations"
        return {int(path.stem.removeprefix("epoch-")): path for path in sorted(folder.glob("epoch-*.json"))}

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

    def clear_training(self) -> None:
        """Forget what was trained here, with its recipe; figures and executed notebooks stay."""
        for folder in self.path.glob("lr-*"):
            shutil.rmtree(folder)
        for name in ("recipe.yml", "environment.json", "base.json"):
            (self.path / name).unlink(missing_ok=True)

    def results(self) -> dict:
        """What the notebooks recorded, by notebook; {} before the first."""
        path = self.path / "results.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def record(self, notebook: str, values: dict) -> None:
        """Put one notebook's results into results.json, leaving the other notebooks' as they are."""
        write_json(self.path / "results.json", dict(sorted({**self.results(), notebook: values}.items())))
