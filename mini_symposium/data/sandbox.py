"""Run code that a model wrote, and tell whether it passes its asserts. Such text is hostile until shown otherwise.

This file is both sides: imported, it starts a child; run as a script, it is the child. The child imports what
answers may use, gives up what it can, and only then runs the code:

- isolated (`-I -S -B`), without environment or input, in an empty temporary directory, its output thrown away;
- CPU time, memory, file size and further processes are limited; as root it becomes nobody first;
- an audit hook refuses every event but a few: no file is opened, nothing is imported beyond `MODULES`, nothing is
  started, deleted, loaded or sent;
- it cannot signal other processes.

That contains accidents and common malice. It is no jail: who expects an attack runs the kit in a container.
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
"""What code may import, beside what Python itself has loaded by then."""

CPU_SECONDS, WALL_SECONDS = 2, 20
"""Work is limited by CPU time, so that a busy machine changes no verdict; the clock only ends what sleeps."""
MEMORY = 512 * 1024**2
LONGEST = 20_000
"""Characters of code; no answer is that long."""
READY = b"ready"


def passes(code: str, asserts: str) -> bool:
    """Whether `code` runs, and `asserts` after it in the same namespace, within the limits.

    Leaving early is no way to pass: the child says a random word once the last assert is through.

    Raises
    ------
    RunError
        If there is no such child to be had, so that no answer fails for what the machine lacks.

    >>> passes("def double(x):\\n    return 2 * x", "assert double(4) == 8")
    True
    >>> passes("raise SystemExit(0)", "assert False")
    False
    """
    import secrets  # here, because the child is to load as little as it can
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
            return child.stdout.read(len(word)) == word.encode()  # and not a byte more, however much is said
        finally:
            timer.cancel()
            child.kill()


def _child() -> None:
    job = json.loads(sys.stdin.buffer.read())
    sys.stdin.close()
    for name in (*MODULES, "resource", "signal"):
        importlib.import_module(name)  # while it can still open files
    answer = sys.modules["answer"] = type(sys)("answer")  # dataclasses look their module up
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
        del limits["AS"]  # which macOS refuses; there the CPU limit must do
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def _lock() -> None:
    """From here on the process can compute and little else. No name holds the hook, so nothing can talk it round."""
    import _imp

    gone = ("kill", "killpg", "pidfd_open", "pidfd_send_signal", "pthread_kill", "setpriority", "mknod", "mkfifo")
    for module in ("os", "posix", "signal", "_signal"):
        for name in gone:
            vars(sys.modules[module]).pop(name, None)
    del _imp.create_builtin  # which would make another `posix`, with all of them
    attributes = {"object.__getattr__", "object.__setattr__", "object.__delattr__"}
    allowed = frozenset({"exec", "compile", "code.__new__", "builtins.id", "sys._getframe", *attributes})

    def hook(event, _):
        if event not in allowed:
            raise PermissionError(event)

    sys.addaudithook(hook)


if __name__ == "__main__":
    _child()
