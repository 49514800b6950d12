"""Checkpoints that can be gone on from: which files they hold, and whether those are still what was written.

Every kept epoch has its adapter. The newest two also hold what resuming needs, with the checksum of every file: where
the newest is damaged, the one before it is gone on from, and ends at the same bits.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mini_symposium.errors import InputError
from mini_symposium.files.writing import write_json
from mini_symposium.run import checkpoints_in, read_object, whole_lines

ADAPTER_FILES = {"adapter_model.safetensors", "adapter_config.json"}
RESUME_FILES = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "checksums.json"}
RESUMABLE = 2
"""How many of the newest keep their RESUME_FILES."""


def seal(folder: Path, lines: int, companions: Sequence[str], compiled: bool) -> None:
    """Write down, last of all, the checksum of every file of a checkpoint, its log's length, and with whom it trained.

    Parameters
    ----------
    companions
        Folders of the adapters of its pass, itself included, as seen from its run: their sums were rounded together.
    compiled
        Whether its layers were: that changes the last bits of a sum.
    """
    written = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    found = {"lines": lines, "companions": list(companions), "compiled": compiled, "files": written}
    write_json(folder / "checksums.json", found)


def compiled(learning_rate_dir: Path, epoch: int) -> bool | None:
    """Whether the layers were compiled when a checkpoint was trained; None if it does not say."""
    folder = checkpoints_in(learning_rate_dir / "checkpoints").get(epoch)
    try:
        said = read_object(folder / "checksums.json").get("compiled") if folder else None
    except InputError:
        return None
    return said if isinstance(said, bool) else None


def companions(learning_rate_dir: Path, epoch: int) -> set[Path]:
    """Folders of the adapters that shared the pass of a checkpoint; none if it does not say."""
    folder = checkpoints_in(learning_rate_dir / "checkpoints").get(epoch)
    try:
        named = read_object(folder / "checksums.json")["companions"] if folder else []
        return {(learning_rate_dir.parent / name).resolve() for name in named}
    except (InputError, LookupError, TypeError):
        return set()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path, metrics: Path) -> str | None:
    """Why a checkpoint cannot be gone on from; None if it can.

    Parameters
    ----------
    metrics
        The log that it goes with, which must have every line that it had then.
    """
    try:
        sealed = (folder / "checksums.json").exists()  # older checkpoints were not
        written = read_object(folder / "checksums.json") if sealed else {"files": {}, "lines": 0}
        for name in sorted({*ADAPTER_FILES, *RESUME_FILES, *written["files"]} - {"checksums.json"}):
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _sha256(folder / name) != written["files"].get(name, _sha256(folder / name)):
                return f"{name} is not what was written"
        lines = written["lines"] or read_object(folder / "trainer_state.json")["global_step"]
        found = len(whole_lines(metrics))
        return f"{metrics.name} has {found} whole lines of {lines}" if found < lines else None
    except (InputError, OSError, LookupError, TypeError, AttributeError) as error:
        return str(error)


def resumable(learning_rate_dir: Path) -> tuple[set[int], dict[Path, str]]:
    """Epochs whose checkpoint can be gone on from, and the damaged among those that should be such, with why."""
    found = {
        epoch: (path, damage(path, learning_rate_dir / "metrics.jsonl"))
        for epoch, path in checkpoints_in(learning_rate_dir / "checkpoints").items()
        if (path / "optimizer.pt").exists()
    }
    return {epoch for epoch, (_, why) in found.items() if not why}, {path: why for path, why in found.values() if why}


def put_aside_older(checkpoints: Path, newest: int) -> None:
    """Take from all checkpoints before the RESUMABLE newest what only resuming needs."""
    older = [path for epoch, path in checkpoints_in(checkpoints).items() if epoch < newest]
    for folder in older[: len(older) - (RESUMABLE - 1)]:
        for name in sorted(RESUME_FILES, key=lambda name: name != "optimizer.pt"):  # the first says what can resume
            with suppress(FileNotFoundError):
                (folder / name).unlink()
