"""Run code that a model wrote, and tell whether it passes its asserts. Such code may do anything.

The code runs in a child process. This file is used by both: the parent imports it, the child runs it as a script. The
child imports the modules that answers may use, gives up its rights, and only then runs the code:

- isolated (`-I -S -B`), without environment or input, in an empty temporary directory, with its output thrown away;
- with limits on CPU time, memory, file size and new processes, and as the user nobody if it was root;
- with an audit hook that refuses almost every event: no file is opened, nothing but `MODULES` is imported, nothing is
  started, deleted, loaded or sent;
- unable to signal other processes.

That contains accidents and common malice, but not a determined attack. Against one, run the kit in a container.
"""

import contextlib
import importlib
import json
import os
import sys

MODULES = (
    *("abc", "bisect", "collections", "collections.abc", "copy", "dataclasses", "datetime", "decimal", "enum"),
    *("fractions", "functools", "heapq", "itertools", "json", "math", "operator", "random", "re", "statistics"),
    *("string", "textwrap", "time", "typing", "unicodedata", "_strptime"),
)
"""Modules that the code may import, besides those that Python itself has loaded by then."""

CPU_SECONDS, WALL_SECONDS = 2, 20
"""CPU time limits the work, so that a busy machine changes no verdict. The wall clock only ends code that sleeps."""
MEMORY = 512 * 1024**2
LONGEST = 20_000
"""Maximum characters of code; no answer has more."""
READY = b"ready"


def passes(code: str, asserts: str) -> bool:
    """Whether `code` runs, and `asserts` after it in the same namespace, within the limits.

    Code that exits early does not pass: the child writes a random word after the last assert. RunError if this machine
    cannot run the child process; an answer must not fail for that reason.

    >>> passes("def double(x):\\n    return 2 * x", "assert double(4) == 8")
    True
    >>> passes("raise SystemExit(0)", "assert False")
    False
    """
    import secrets  # here, because the child should load as little as possible
    import subprocess
    import tempfile
    import threading

    from mini_symposium.errors import RunError

    if len(code) > LONGEST:
        return False
    word = secrets.token_hex(16)
    job = json.dumps({"code": code, "asserts": asserts, "word": word}).encode()
    command = [sys.executable, "-I", "-S", "-B", __file__]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with (
        tempfile.TemporaryDirectory(prefix="mini-symposium-") as empty,
        subprocess.Popen(command, cwd=empty, env={}, start_new_session=True, **pipes) as child,
    ):
        timer = threading.Timer(WALL_SECONDS, child.kill)
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(job)
                child.stdin.close()
            if child.stdout.read(len(READY)) != READY:
                why = child.stderr.read().decode(errors="replace").strip().split("\n")[-1]
                raise RunError(f"the code of an answer cannot be run safely here ({why}); Linux and macOS can")
            timer.start()
            return child.stdout.read(len(word)) == word.encode()  # reads no more, however much the child writes
        finally:
            timer.cancel()
            child.kill()


def _child() -> None:
    job = json.loads(sys.stdin.buffer.read())
    sys.stdin.close()
    for name in (*MODULES, "resource", "signal"):
        importlib.import_module(name)  # while files can still be opened
    answer = sys.modules["answer"] = type(sys)("answer")  # dataclasses look up the module of a class
    channel, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    _limit()
    _lock()
    os.write(channel, READY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    exec(compile(job["code"], "answer", "exec"), vars(answer))
    exec(compile(job["asserts"], "asserts", "exec"), vars(answer))
    os.write(channel, job["word"].encode())
    os._exit(0)


def _limit() -> None:
    import resource

    if os.getuid() == 0:  # limits do not bind root
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    limits = {"CPU": CPU_SECONDS, "AS": MEMORY, "FSIZE": 0, "NPROC": 0, "CORE": 0}
    if sys.platform == "darwin":
        del limits["AS"]  # macOS refuses it
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def _lock() -> None:
    """Let the process do little but compute. No variable refers to the hook, so the code cannot change it."""
    import _imp

    removed = ("kill", "killpg", "pidfd_open", "pidfd_send_signal", "pthread_kill", "setpriority", "mknod", "mkfifo")
    for module in ("os", "posix", "signal", "_signal"):
        for name in removed:
            vars(sys.modules[module]).pop(name, None)
    del _imp.create_builtin  # with it, code could make another `posix` that has all of them
    attributes = {"object.__getattr__", "object.__setattr__", "object.__delattr__"}
    allowed = frozenset({"exec", "compile", "code.__new__", "builtins.id", "sys._getframe", *attributes})

    def hook(event, _):
        if event not in allowed:
            raise PermissionError(event)

    sys.addaudithook(hook)


if __name__ == "__main__":
    _child()
