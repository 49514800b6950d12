"""The passes of a sweep as tasks on a Ray cluster; see `sweep` for what a pass is.

The rules:

- everything that is kept lies in the sweep's folder, which every node sees under the same path; Ray only sends tasks;
- a task whose node or worker dies is started elsewhere, and resumes at the last checkpoint in that folder;
- a task that only seems dead still holds the locks of its run directories: its successor waits until they are free.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mini_symposium.errors import InputError, RunError, reason

INSTALL = "pip install -e '.[ray]'"

RETRIES = 100
"""How often a pass that died is started again. Limited, because the pass itself may kill its nodes."""

PATIENCE = 600.0
"""Seconds to wait for a predecessor's locks: a node that lost its cluster ends its workers within minutes."""

POLL = 2.0
"""Seconds between two checks of which nodes are alive."""


def run(
    passes: Sequence[tuple],
    work: Callable[..., None],
    finished: Callable[[int, float], None],
    say: Callable[[str], None] = print,
    cpus: int = 1,
) -> None:
    """Call `work(*arguments, PATIENCE)` on the cluster for each of `passes`, as many at once as fit.

    The cluster is the one that RAY_ADDRESS names, else one that runs on this machine, else one that is started here and
    stopped at the end.

    Parameters
    ----------
    finished
        Called with the number of each pass as it ends, from 0, and the seconds since the start.
    cpus
        Cores of a pass, which is also its number of threads; on a cluster with GPUs it takes one of them too.

    Raises
    ------
    InputError
        If Ray is not installed, the cluster cannot be reached, or no node has so many cores; or a pass raised it.
    RunError
        If a pass failed, or died more than RETRIES times; raised when all others have ended.
    """
    ray = _imported()
    ours = not ray.is_initialized()
    if ours:
        _connect(ray)
    try:
        nodes = _alive(ray)
        if cpus > (most := max((node["Resources"].get("CPU", 0) for node in nodes.values()), default=0)):
            raise InputError(f"--cpus {cpus}: no node of the cluster has more than {most:g}")
        gpus = min(1, ray.cluster_resources().get("GPU", 0))
        say(f"Ray: passes {len(passes)}, nodes {len(nodes)}, cores {ray.cluster_resources().get('CPU', 0):g}")
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": RETRIES, "scheduling_strategy": "SPREAD"}
        task = ray.remote(**options)(_pass)
        running = {task.remote(str(Path.cwd()), work, each): number for number, each in enumerate(passes)}
        _wait(ray, running, nodes, finished, say)
    finally:
        if ours:
            ray.shutdown()


def _imported():
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError(f"--engine ray: Ray is not installed; `{INSTALL}` adds it") from error
    return ray


def _connect(ray) -> None:
    address = os.environ.get("RAY_ADDRESS")
    host, colon, port = (address or "").rpartition("://")[2].rpartition(":")
    try:
        if colon and port.isdecimal():  # fails within seconds if nothing listens there; Ray would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="error")
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"RAY_ADDRESS={address}: no cluster answers there ({reason(error)})") from error


def _alive(ray) -> dict[str, dict]:
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _pass(directory: str, work: Callable[..., None], arguments: tuple) -> None:
    """What runs on a node: `work` in the caller's working directory, where relative paths mean the same."""
    there = Path(directory).is_dir()
    with contextlib.chdir(directory) if there else contextlib.nullcontext():
        work(*arguments, PATIENCE)


def _wait(ray, running: dict, nodes: dict, finished, say) -> None:
    """Wait until every task has ended; then raise the first failure."""
    began, failures = time.monotonic(), []
    while running:
        done, _ = ray.wait(list(running), timeout=POLL)
        alive = _alive(ray)
        for gone in nodes.keys() - alive.keys():
            say(f"node {nodes[gone]['NodeManagerAddress']} is gone; its passes resume elsewhere from their checkpoints")
        nodes = alive
        for task in done:
            number = running.pop(task)
            try:
                ray.get(task)
            except ray.exceptions.RayError as error:
                failures.append(_as_ours(number, error))
                say(f"pass {number + 1} failed: {failures[-1]}")
            else:
                finished(number, time.monotonic() - began)
    if failures:
        raise failures[0]


def _as_ours(number: int, error: Exception) -> InputError | RunError:
    """The error that a task raised, if it is one of the kit's; else a RunError with its last line."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, InputError | RunError):
        return cause
    lines = [line for line in str(cause or error).splitlines() if line.strip()] or [type(error).__name__]
    return RunError(f"pass {number + 1} ended with {type(cause or error).__name__}: {lines[-1].strip()}")
