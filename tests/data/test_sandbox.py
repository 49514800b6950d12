import os
from pathlib import Path

import psutil
import pytest

from mini_symposium.data import sandbox
from mini_symposium.data.sandbox import passes
from mini_symposium.errors import RunError

ORDINARY = """
import json, math, random, re
from collections import Counter, namedtuple
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

Point = namedtuple("Point", "x y")

@dataclass(order=True)
class Job:
    name: str
    tags: list = field(default_factory=list)

class Colour(Enum):
    RED = 1

class Pair(NamedTuple):
    a: int

@lru_cache(maxsize=None)
def fib(n):
    return n if n < 2 else fib(n - 1) + fib(n - 2)

random.shuffle(list(range(3)))
print("some output")
if __name__ == "__main__":
    print(input())
"""


def test_ordinary_code_passes_its_asserts():
    asserts = """
assert fib(50) == 12586269025 and Point(1, 2).y == 2 and Job("a") < Job("b") and Colour(1) is Colour.RED
assert datetime.strptime("2024-02-03", "%Y-%m-%d").day == 3 and Counter("aab")["a"] == 2
assert json.loads("[1]") == [1] and re.sub("a", "b", "aa") == "bb" and math.isclose(math.pi, 3.1416, abs_tol=1e-4)
"""
    assert passes(ORDINARY, asserts)
    assert not passes(ORDINARY, asserts + "assert fib(3) == 3\n")


@pytest.mark.parametrize(
    "code",
    [
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "def f(:",
        "x = '\ud800'",
        "x = 1\0",
        "def f(): f()\nf()",
        "x = 1" + "\n" * sandbox.LONGEST,
        "input()",
    ],
)
def test_code_that_ends_early_or_is_none_does_not_pass(code):
    assert not passes(code, "pass")


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "while True: print('x' * 10**6)",
        "import os\nwhile True: os.write(3, b'x' * 10**6)",
        "import os\nwhile True:\n    try: os.fork()\n    except Exception: pass",
        "x = 'a' * 10**9",
    ],
    ids=["loop", "gigabytes", "gigabytes on every pipe", "fork bomb", "memory"],
)
def test_code_without_end_is_ended(code):
    assert not passes(code, "pass")


def test_what_sleeps_is_ended_too(monkeypatch):
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 1)
    assert not passes("import time\ntime.sleep(3600)", "pass")


def test_nothing_is_written_read_deleted_or_started(tmp_path):
    """Each attempt catches what stops it, so that `passes` tells whether all of them were stopped."""
    victim = tmp_path / "victim"
    victim.write_text("still here")
    tmp_path.chmod(0o777)
    victim.chmod(0o666)
    attempts = [
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(victim)!r}, 'a').write('x')",
        f"open({str(victim)!r}).read()",
        "open('here', 'w')",
        "open('/proc/self/environ').read()",
        "open(0).read()",
        f"os.open({str(victim)!r}, os.O_RDWR)",
        f"os.remove({str(victim)!r})",
        f"os.rename({str(victim)!r}, {str(tmp_path / 'gone')!r})",
        f"os.truncate({str(victim)!r}, 0)",
        f"os.chmod({str(victim)!r}, 0)",
        f"os.mkdir({str(tmp_path / 'folder')!r})",
        f"os.symlink('/', {str(tmp_path / 'link')!r})",
        f"os.mkfifo({str(tmp_path / 'fifo')!r})",
        "os.listdir('/')",
        "os.fork()",
        "os.system('true')",
        "os.execv('/bin/true', ['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.kill(os.getpid(), 0)",
        "os.killpg(os.getpgrp(), 0)",
        "os.setpriority(os.PRIO_PROCESS, 0, 19)",
        "import subprocess",
        "import socket",
        "import ctypes",
        "import threading; threading.Thread(target=print).start()",
        "import _thread; _thread.start_new_thread(print, ())",
        "import gc; gc.get_objects()",
        "import sys; del sys.modules['posix']; import posix; posix.kill",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (60, 60))",
        "import sys; b = sys.modules['_frozen_importlib'].BuiltinImporter; b.create_module(b.find_spec('posix'))",
    ]
    code = "import os\nsucceeded = []\n" + "".join(
        f"try:\n    {attempt}\nexcept Exception:\n    pass\nelse:\n    succeeded.append({attempt!r})\n"
        for attempt in attempts
    )
    assert passes(code, "assert succeeded == []")
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    assert victim.read_text() == "still here"


def test_the_environment_and_the_arguments_hold_nothing(monkeypatch):
    monkeypatch.setenv("A_SECRET", "s3cr3t")
    assert passes("import os, sys", "assert 'A_SECRET' not in os.environ and 'HOME' not in os.environ")
    assert passes("import os", "assert os.getcwd() != '/' and 'mini-symposium-' in os.getcwd()")


def test_a_machine_that_cannot_contain_code_says_so_instead_of_failing_answers(tmp_path, monkeypatch):
    broken = Path(sandbox.__file__).read_text().replace("resource.setrlimit(", "resource.no_such_limit(")
    (tmp_path / "sandbox.py").write_text(broken)
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
    with pytest.raises(RunError, match=r"cannot be run safely here \(AttributeError: .*no_such_limit"):
        passes("x = 1", "assert x == 1")


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    children = set(_children())
    assert passes("x = 1", "assert x == 1")
    assert not passes("while True: pass", "pass")
    assert list(tmp_path.iterdir()) == []
    assert set(_children()) <= children


def _children():
    return [child.pid for child in psutil.Process(os.getpid()).children(recursive=True)]
