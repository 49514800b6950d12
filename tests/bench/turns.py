"""The programs that are compared, the contestants, take turns: each does its work when asked, reports, and waits.

Each is a process of its own, so that its memory is measured alone and it can run in another environment. While it waits
it uses no processor time. This module imports only the standard library, because the peers' environments import it
too. The messages:

    bench -> contestant   how many times to do the work; the end of the input means: leave
    contestant -> bench   "ready", then a JSON object after each turn
"""

import json
import os
import queue
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path


def child_environment() -> dict[str, str]:
    """Environment variables with which any Python finds the package `bench`, from any folder."""
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


class Turn:
    """The contestant's side: `wait` ends a turn and begins the next."""

    def __init__(self, device: str = "cpu"):
        self.device, self.started, self.times, self.left = device, None, 0, 0
        # Only messages to the bench go to stdout; what libraries print goes to stderr.
        self.stdout = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self, **measured) -> bool:
        """Call this before the first piece of work and after each.

        At the end of a turn it reports the time, the memory and `measured`, and waits; False if there is no next turn.
        """
        self.left -= 1
        if self.left > 0:
            return True
        if self.started is None:
            report = "ready"
        else:
            if self.device == "cuda":
                import torch

                torch.cuda.synchronize()
            seconds = (time.perf_counter() - self.started) / self.times
            report = {"seconds": seconds, **self._memory(), **measured}
        print(json.dumps(report), file=self.stdout, flush=True)
        request = sys.stdin.readline().strip()
        self.times = self.left = int(request or 0)
        self.started = time.perf_counter()
        return bool(request)

    def run(self, work: Callable[[], dict | None]) -> None:
        """Call `work` as often as the bench asks; what it returns is reported."""
        going = self.wait()
        while going:
            going = self.wait(**(work() or {}))

    def _memory(self) -> dict[str, int]:
        if self.device == "cuda":
            import torch

            return {"bytes": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}
        pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
        unit = 1 if sys.platform == "darwin" else 1024
        return {
            "bytes": pages * resource.getpagesize(),
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        }


class Contestant:
    """The bench's side: a process that works when asked.

    Attributes
    ----------
    turns : list of dict
        What each turn measured: seconds for each piece of work, bytes, peak, and what the contestant adds.
    first : float or None
        Seconds from the start of the process to the end of its first turn; None before that.

    Raises
    ------
    RuntimeError
        If the process ends, or does not answer within `timeout` seconds; with the last line it printed.
    """

    def __init__(self, name: str, python: str | Path, arguments: Sequence[object], folder: Path, timeout: float = 600):
        self.name, self.turns, self.timeout = name, [], timeout
        self.started, self.first = time.perf_counter(), None
        self.log = (folder / f"{name.replace(' ', '-')}.log").open("w+", encoding="utf-8")
        command = [str(python), *map(str, arguments)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen(command, env=child_environment(), text=True, **pipes)
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._next()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def _next(self):
        try:
            line = self.lines.get(timeout=self.timeout)
        except queue.Empty:
            line = ""
        if not line:
            self.end()
            self.log.seek(0)
            printed = [text for text in self.log.read().splitlines() if text.strip()]
            raise RuntimeError(f"{self.name} ended: {printed[-1] if printed else 'no reason given'}")
        return json.loads(line)

    def turn(self, times: int = 1) -> dict:
        """Let it do its work `times` times; return what it measured."""
        print(times, file=self.process.stdin, flush=True)
        measured = self._next()
        self.first = self.first or time.perf_counter() - self.started
        self.turns.append(measured)
        return measured

    def end(self) -> None:
        """Close its input and wait until the process has ended."""
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
