"""Files and folders that are there whole or not at all, whenever the process, or the machine, comes to its end.

What is written goes to a folder with a name of its own, `.epoch-0007.x1y2.part`, reaches the disk, and is renamed. The
folder is locked while its writer lives, so that what a killed one left behind can be told from what is being written.
"""

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mini_symposium.errors import InputError

PART = ".part"
"""How the name of such a folder ends."""


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
    folder = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder, lock = _folder_beside(path)
        yield folder / path.name
        _reach_disk(folder / path.name)
        (folder / path.name).replace(path)
        _sync(path.parent)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another --run"
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def write_json(path: str | Path, value) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with written_whole(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        # Half a character, from a file name that is no text, becomes the escape that JSON has for it.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def discard(path: Path) -> None:
    """Delete a folder such that it is never there in half."""
    folder, lock = _folder_beside(path)
    try:
        path.replace(folder / path.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def clear_away(folder: Path, name: str = "") -> list[Path]:
    """Delete what killed writers of `folder`/`name`, or of anything below `folder`, left behind; return it."""
    left = []
    for part in sorted(folder.glob(f".{name}.*{PART}") if name else folder.rglob(f".*{PART}")):
        with _abandoned(part) as abandoned:
            if abandoned:
                shutil.rmtree(part, ignore_errors=True)
                left.append(part)
    return left


def being_written(path: Path) -> bool:
    """Whether a process that lives is writing `path`."""
    for folder in path.parent.glob(f".{path.name}.*{PART}"):
        with _abandoned(folder) as abandoned:
            if not abandoned:
                return True
    return False


@contextmanager
def _abandoned(folder: Path) -> Iterator[bool]:
    """Whether no writer lives, and none begins meanwhile; where a disk has no locks nobody knows, so it is no."""
    lock = None
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError as error:
        free = isinstance(error, FileNotFoundError)
    try:
        yield free
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def alone(folder: Path, name: str = ".lock", patience: float = 0.0) -> Iterator[None]:
    """Hold `folder`; a second process is refused. The lock ends with the process, however that ends.

    Parameters
    ----------
    name
        Of the lock: one folder may have several; "" locks the folder itself and leaves no file.
    patience
        Seconds to wait for it; a killed process may leave a child that takes a moment to notice.
    """
    held = (os.getpid(), folder.absolute(), name)
    if held in _held:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / name, os.O_RDWR | os.O_CREAT if name else os.O_RDONLY, 0o666)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another --run") from error
    try:
        until = time.monotonic() + patience
        while not _locked(lock):
            if time.monotonic() >= until:
                raise InputError(f"{folder}: another process works here; wait for it, or choose another --run")
            time.sleep(0.1)
        _held.add(held)
        yield
    finally:
        _held.discard(held)
        os.close(lock)


_held: set[tuple[int, Path, str]] = set()
"""What this process holds: to hold it again is no second process."""


def _locked(lock: int) -> bool:
    """Take a lock, if nobody has it; on a disk that has no locks nobody ever does."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _folder_beside(path: Path) -> tuple[Path, int]:
    """A new locked folder to write `path` in, and the lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent))
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):  # a disk that has no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():  # and was not cleared away in the moment before it was locked
            return folder, lock
        os.close(lock)


def _reach_disk(path: Path) -> None:
    for below in (path, *path.rglob("*")) if path.is_dir() else (path,):
        _sync(below)


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
