"""Checkpoints that a training can resume from: which files they hold, and whether those are still what was written.

Every kept epoch has its adapter. The newest two also hold what resuming needs, with the checksum of every file: where
the newest is damaged, training resumes from the one before it, and ends at the same bits.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mini_symposium.errors import InputError
from mini_symposium.files.writing import write_json
from mini_symposium.run import Training, read_object, whole_lines

ADAPTER_FILES = {"adapter_model.safetensors", "adapter_config.json"}
RESUME_FILES = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "checksums.json"}
RESUMABLE = 2
"""How many of the newest checkpoints keep their RESUME_FILES."""


def seal(folder: Path, lines: int, companions: Sequence[str], compiled: bool) -> None:
    """Write checksums.json, the last file of a checkpoint.

    Parameters
    ----------
    lines
        Number of log lines when the checkpoint is written.
    companions
        Folders of the adapters of this pass, this one included, relative to its run directory: the pass affects
        rounding.
    compiled
        Whether the layers were compiled, which changes the last bits of a sum.
    """
    checksums = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    sealed = {"lines": lines, "companions": list(companions), "compiled": compiled, "files": checksums}
    write_json(folder / "checksums.json", sealed)


def _sealed(training: Training, epoch: int) -> dict:
    """What `seal` wrote; {} if it cannot be read."""
    try:
        return read_object(training.checkpoint(epoch) / "checksums.json")
    except InputError:
        return {}


def compiled(training: Training, epoch: int) -> bool | None:
    """Whether the layers were compiled when a checkpoint was trained; None if it does not say."""
    found = _sealed(training, epoch).get("compiled")
    return found if isinstance(found, bool) else None


def companions(training: Training, epoch: int) -> set[Path]:
    """Folders of the adapters that trained in one pass up to a checkpoint; empty if it does not say."""
    try:
        return {(training.run / name).resolve() for name in _sealed(training, epoch).get("companions", [])}
    except TypeError:  # edited by hand
        return set()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path, metrics: Path) -> str | None:
    """Why training cannot resume from a checkpoint; None if it can.

    Parameters
    ----------
    metrics
        The log that goes with it, which must still have every line that it had then.
    """
    try:
        sealed = read_object(folder / "checksums.json")
        for name in sorted({*ADAPTER_FILES, *RESUME_FILES} - {"checksums.json"}):
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _sha256(folder / name) != sealed["files"][name]:
                return f"{name} is not what was written"
        lines = len(whole_lines(metrics))
        return f"{metrics.name} has {lines} whole lines of {sealed['lines']}" if lines < sealed["lines"] else None
    except (InputError, OSError, LookupError, TypeError) as error:
        return str(error)


def resumable(training: Training) -> tuple[set[int], dict[Path, str]]:
    """The epochs from which training can resume; and the damaged checkpoints among the newest, with the reason."""
    reasons = {
        (epoch, path): damage(path, training.metrics_file)
        for epoch, path in training.checkpoints().items()
        if (path / "optimizer.pt").exists()
    }
    whole = {epoch for (epoch, _), reason in reasons.items() if not reason}
    return whole, {path: reason for (_, path), reason in reasons.items() if reason}


def finished(training: Training) -> bool:
    """Whether the last checkpoint is there and whole."""
    last = training.checkpoints().get(training.num_epochs)
    return last is not None and last not in resumable(training)[1]


def strip_older(training: Training, newest: int) -> None:
    """Delete RESUME_FILES from all but the RESUMABLE newest checkpoints up to epoch `newest`."""
    older = [path for epoch, path in training.checkpoints().items() if epoch < newest]
    for folder in older[: len(older) - (RESUMABLE - 1)]:
        for name in sorted(RESUME_FILES, key=lambda name: name != "optimizer.pt"):  # first: it makes one resumable
            with suppress(FileNotFoundError):
                (folder / name).unlink()


def plan_passes(
    trainings: Sequence[Training], together: int, verbose: bool = True
) -> list[tuple[list[Training], int | None]]:
    """Trainings to run in one pass, at most `together`, and the epoch from which each pass resumes; None: the start.

    Trainings that shared a pass share it again, from the newest epoch for which all of them have a resumable
    checkpoint. Without such an epoch, each resumes in a pass of its own; but if none has more than one resumable
    checkpoint, the pass was interrupted while it wrote its first checkpoints, and begins again. If `verbose`, damaged
    checkpoints are printed.
    """
    kept = []
    for training in trainings:
        whole, damaged = resumable(training)
        kept.append(whole)
        for path, reason in damaged.items() if verbose else ():
            print(f"{path}: damaged ({reason}); resuming from {f'epoch {max(whole)}' if whole else 'the beginning'}")
    shared = [companions(t, max(epochs)) for t, epochs in zip(trainings, kept, strict=True) if epochs]
    groups: dict[frozenset[Path], list[int]] = {}
    for number, training in enumerate(trainings):
        together_with = next((group for group in shared if training.folder.resolve() in group), set())
        groups.setdefault(frozenset(together_with), []).append(number)
    passes = []
    for numbers in groups.values():
        group, epochs = [trainings[number] for number in numbers], [kept[number] for number in numbers]
        common = set.intersection(*epochs)
        if not common and max(map(len, epochs)) > 1:
            passes += [([training], max(own, default=None)) for training, own in zip(group, epochs, strict=True)]
        else:
            parts = [group[start : start + together] for start in range(0, len(group), together)]
            passes += [(part, max(common, default=None)) for part in parts]
    return passes
