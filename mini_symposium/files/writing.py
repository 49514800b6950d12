"""Writing files and folders whole or not at all, even if the process is killed or the machine crashes.

A file is written in a new folder beside its destination, such as `.epoch-0007.x1y2.part`, flushed to disk, and renamed.
The folder is locked while its writer lives, which distinguishes a file that is being written from the leftovers of a
killed writer.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mini_symposium.errors import InputError

PART = ".part"
"""Suffix of the temporary folder's name."""
LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Error numbers of a file system without locks."""


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; if the block raises nothing, it is renamed to `path`.

    Works for a file and for a directory (the body then makes the directory itself). InputError if the disk is full or
    cannot be written; `path` is then unchanged.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _folder_beside(path) as folder:
            yield folder / path.name
            for written in (folder / path.name, *(folder / path.name).rglob("*")):
                _sync(written)
            (folder / path.name).replace(path)
            _sync(path.parent)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another --run"
        ) from error


def write_json(path: str | Path, value) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with written_whole(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        # Half a surrogate pair, from a file name that is not UTF-8, becomes its escape in JSON.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_new(out: Path) -> None:
    """Refuse to write a folder that exists."""
    if out.exists():
        raise InputError(f"{out}: is there already; choose another folder or delete it")


def check_room(out: Path, size: int) -> None:
    """Refuse at the start if the disk of `out` has too little room; if it fills up later, `written_whole` says so."""
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        raise InputError(f"{out}: takes {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free; choose another disk")


def discard(path: Path) -> None:
    """Delete a folder so that `path` never holds only a part of it."""
    with _folder_beside(path) as folder:
        path.replace(folder / path.name)


def clear_away(folder: Path, name: str = "") -> bool:
    """Delete what killed writers left behind: of `folder`/`name`, or without a name of anything below `folder`.

    Returns whether a living process is writing there. Also True if leftovers are on a file system without locks.
    """
    being_written = False
    for part in folder.glob(f".{name}.*{PART}") if name else list(folder.rglob(f".*{PART}")):
        try:
            lock = _lock(part / LOCK)
        except OSError:  # its writer has the lock
            being_written = True
            continue
        if lock.is_locked:
            shutil.rmtree(part, ignore_errors=True)
            lock.release()
        else:
            being_written = True
    return being_written


@contextmanager
def alone(folder: Path, name: str = LOCK, patience: float = 0.0) -> Iterator[None]:
    """Keep other processes and threads from working in `folder`, until the end of the block or of the process.

    A folder may have several locks, by `name`. After `patience` seconds another process is an InputError.
    """
    try:
        lock = _lock(folder / name, patience, reentrant=True)
    except TimeoutError:
        raise InputError(f"{folder}: another process works here; wait for it, or choose another --run") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another --run") from error
    try:
        yield
    finally:
        lock.release()


def _lock(path: Path, patience: float = 0.0, reentrant: bool = False):
    """Lock the file `path`; the lock ends with the process. If `reentrant`, this thread may lock it several times.

    Missing folders are made. On a file system without locks nothing is locked: the lock's `is_locked` is False. It is a
    TimeoutError if another process or thread still has the lock after `patience` seconds.
    """
    from filelock import FileLock  # here, because its import would slow `--help` by a third

    lock = FileLock(path, is_singleton=reentrant, fallback_to_soft=False)
    try:
        lock.acquire(timeout=patience)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return lock


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A new folder to write `path` in, locked until it is deleted at the end of the block."""
    folder, lock = None, None
    try:
        while lock is None:
            folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent))
            with suppress(FileNotFoundError):  # another process cleared it away before it was locked
                lock = _lock(folder / LOCK, patience=60)
        yield folder
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        if lock:
            lock.release()
            shutil.rmtree(folder, ignore_errors=True)  # Windows deletes no file that is open, as the lock's was


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folder; a rename there is on disk when it returns
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
