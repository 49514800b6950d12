import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mini_symposium.errors import InputError
from mini_symposium.files.writing import alone, clear_away, discard, write_json, written_whole

USE = "import os, sys, time, pathlib\nfrom mini_symposium.files.writing import *\nfolder = pathlib.Path(sys.argv[1])\n"


def python(code: str, folder: Path, **how) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", USE + code, str(folder)], stdout=subprocess.PIPE, text=True, **how)


def refused(folder: Path) -> bool:
    """Whether another process may not work in `folder`."""
    with python("with alone(folder): print('held')", folder, stderr=subprocess.PIPE) as other:
        said, error = other.communicate()
    assert said == "held\n" or "another process works here" in error, error
    return said == ""


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(ZeroDivisionError), written_whole(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_is_said_in_one_line(tmp_path):
    with (
        pytest.raises(InputError, match=r"a\.json: cannot be written \(No space left"),
        written_whole(tmp_path / "a.json"),
        Path("/dev/full").open("w") as full,
    ):
        full.write("x" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for use in (alone, written_whole):
        with pytest.raises(InputError, match=r"file/a: cannot be written \("), use(tmp_path / "file" / "a"):
            pass
    (tmp_path / ".lock").mkdir()
    with pytest.raises(InputError, match=r"cannot be written \(Is a directory\)"), alone(tmp_path):
        pass


def test_half_a_character_is_written_as_its_escape(tmp_path):
    write_json(tmp_path / "a.json", {"name": "\udcff", "word": "é"})
    assert (tmp_path / "a.json").read_text() == '{\n  "name": "\\udcff",\n  "word": "é"\n}\n'


def test_what_a_killed_writer_left_is_cleared_away_and_what_is_being_written_is_not(tmp_path):
    code = "with written_whole(folder / 'dead') as path:\n    path.mkdir()\n    os.kill(os.getpid(), 9)"
    python(code, tmp_path).wait()
    [dead] = tmp_path.glob(".dead.*.part")
    with written_whole(tmp_path / "alive") as temporary:
        temporary.mkdir()
        assert not clear_away(tmp_path, "other") and dead.exists()
        assert clear_away(tmp_path, "alive") and clear_away(tmp_path)
        assert temporary.is_dir() and not dead.exists()
    assert not clear_away(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["alive"]
    discard(tmp_path / "alive")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_cleared_away_before_its_writer_locks_it_is_made_again(tmp_path, monkeypatch):
    """The cleaner comes in the moment between: it locks the new folder and deletes it."""
    lock, cleared = fcntl.flock, []

    def flock(descriptor, operation):
        if not cleared:
            cleared.append(next(tmp_path.glob("*.part")))
            (cleared[0] / ".lock").unlink()
            cleared[0].rmdir()
        return lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    write_json(tmp_path / "a.json", 1)
    assert cleared and [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_lock_may_be_taken_again_by_its_own_process(tmp_path):
    with alone(tmp_path), alone(tmp_path), alone(tmp_path, ".other"):
        assert refused(tmp_path)
    assert not refused(tmp_path)


def test_a_lock_is_kept_until_whoever_took_it_first_is_done(tmp_path):
    with alone(tmp_path):
        with alone(tmp_path):
            pass
        assert refused(tmp_path)


def test_a_lock_ends_with_a_killed_process_and_a_forked_one_does_not_hold_it(tmp_path):
    code = """
with alone(folder):
    if os.fork() == 0:
        try:
            with alone(folder):
                print("the child too", flush=True)
        except ValueError:
            print("refused", flush=True)
        time.sleep(600)
    time.sleep(600)
"""
    with python(code, tmp_path, start_new_session=True) as holder:
        assert holder.stdout.readline() == "refused\n"
        assert refused(tmp_path)
        holder.kill()
        holder.wait()
        assert not refused(tmp_path)  # though the child lives
        os.killpg(holder.pid, 9)


def test_who_waits_long_enough_gets_the_lock(tmp_path):
    with python("with alone(folder):\n    print('held', flush=True)\n    time.sleep(0.5)", tmp_path) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another process works here"), alone(tmp_path):
            pass
        with alone(tmp_path, patience=60):
            pass


@pytest.mark.parametrize("answer", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_stops_nobody_and_nothing_on_it_is_cleared_away(tmp_path, monkeypatch, answer):
    def flock(descriptor, operation):
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(fcntl, "flock", flock)
    with alone(tmp_path / "run"), alone(tmp_path / "run"):
        write_json(tmp_path / "run" / "a.json", 1)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "a.json"}
    left = tmp_path / ".b.x1y2.part"
    left.mkdir()
    assert clear_away(tmp_path) and left.exists()
