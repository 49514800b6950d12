"""Contestants take turns: one does a piece of work when told to, says how long it took, and waits.

Each is a process of its own, so that its memory is its own and it may live in another environment; while it waits for
its turn it uses no processor. This module needs the standard library alone. On the way:

    bench -> contestant   how many times to do it, or the end of the input
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
    """Environment variables with which any Python finds this package, from any folder."""
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


class Turn:
    """The contestant's side: `wait` ends a piece of work and begins the next."""

    def __init__(self, device: str = "cpu"):
        self.device, self.started, self.times, self.left = device, None, 0, 0
        # What libraries print goes to stderr: stdout is the line to the bench.
        self.line = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self, **measured) -> bool:
        """At the end of a turn report it, with `measured`, and wait; False when there is none after it."""
        self.left -= 1
        if self.left > 0:
            return True
        if self.started is None:
            report = "ready"
        else:
            if self.device == "cuda":
                import torch

                torch.cuda.synchronize()
            taken = (time.perf_counter() - self.started) / self.times
            report = {"seconds": taken, **self._memory(), **measured}
        print(json.dumps(report), file=self.line, flush=True)
        told = sys.stdin.readline().strip()
        self.times = self.left = int(told or 0)
        self.started = time.perf_counter()
        return bool(told)

    def run(self, work: Callable[[], dict | None]) -> None:
        """Call `work` as often as told."""
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
    """The bench's side: a process that works when told to.

    Attributes
    ----------
    turns : list of dict
        What each turn measured: seconds for each time, bytes, peak, and what the contestant adds.
    waited : float
        Seconds from the start of the process to the end of its first turn.
    """

    def __init__(self, name: str, python: str | Path, arguments: Sequence[object], folder: Path, patience: float = 600):
        self.name, self.turns, self.patience = name, [], patience
        self.begun, self.first = time.perf_counter(), None
        self.errors = (folder / f"{name.replace(' ', '-')}.log").open("w+", encoding="utf-8")
        command = [str(python), *map(str, arguments)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
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
            line = self.lines.get(timeout=self.patience)
        except queue.Empty:
            line = ""
        if not line:
            self.end()
            self.errors.seek(0)
            said = [text for text in self.errors.read().splitlines() if text.strip()]
            raise RuntimeError(f"{self.name} ended: {said[-1] if said else 'no reason given'} ({self.errors.name})")
        return json.loads(line)

    def turn(self, times: int = 1) -> dict:
        """One turn, in which it does its work `times` times; what it measured."""
        print(times, file=self.process.stdin, flush=True)
        found = self._next()
        self.first = self.first or time.perf_counter() - self.begun
        self.turns.append(found)
        return found

    def end(self) -> None:
        """Close the line and wait for the process to leave."""
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
