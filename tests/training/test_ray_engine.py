"""The sweep on a real Ray cluster of two nodes on this machine, one of which is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from mini_symposium.claims.evidence import load_evidence
from mini_symposium.claims.ledger import judge
from mini_symposium.data.dataset import fingerprint, load_examples
from mini_symposium.errors import InputError
from mini_symposium.recipe import load_recipe
from mini_symposium.run import RunDirectory, Training, find
from mini_symposium.training import finetune, ray_engine
from mini_symposium.training.experiments import grid
from mini_symposium.training.sweep import run_grid, train_experiments

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}  # beside other jobs a nice worker would wait for minutes
if not os.environ.get("CI"):  # where it would fail
    pytest.importorskip("ray", reason=ray_engine.INSTALL)
from ray.cluster_utils import Cluster

EPOCHS, ROWS = 12, 3
GRID = {"learning_rates": [1e-3, 1e-4], "ranks": [2, 4], "seeds": [1], "epochs": EPOCHS, "per_pass": 2}
"""Two passes of two adapters, with too few steps to compile for."""
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
ENOUGH = 300
"""Seconds for anything here, on a machine that does much else."""


@pytest.fixture(scope="module")
def cluster():
    made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    """The tiny recipe, on three examples."""
    folder = tmp_path_factory.mktemp("recipe")
    examples = load_examples(find("data/minisymposium.md"))[:ROWS]
    (folder / "few.md").write_text("\n\n".join(example.text for example in examples))
    data = [{"path": str(folder / "few.md"), "type": "completion"}]
    (folder / "few.yml").write_text(load_recipe("tiny", datasets=data).to_yaml())
    return str(folder / "few.yml")


@pytest.fixture
def one_thread():
    """As a task on Ray has: other numbers of threads may round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lines(root: Path) -> dict[str, list[str]]:
    """The log of each experiment."""
    return {file.parts[-3]: file.read_text().splitlines() for file in sorted(root.glob("*/lr-*/metrics.jsonl"))}


def results(root: Path) -> dict[str, object]:
    """All that a sweep found out, but how long each step took."""
    found: dict[str, object] = {"table": (root / "sweep.csv").read_text()}
    for name, log in lines(root).items():
        found[name] = [{**json.loads(line), "seconds": 0} for line in log]
    kept = [*root.glob("*/lr-*/checkpoints/*/adapter_model.safetensors"), *root.glob("*/lr-*/probes.jsonl")]
    return found | {str(file.relative_to(root)): file.read_bytes() for file in kept}


def halfway(raylet: int) -> tuple[psutil.Process, list[Path]] | None:
    """The worker of a node that trains, and its logs, once there is a checkpoint of each to go on from."""
    for worker in psutil.Process(raylet).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # idle workers come and go
            if "ray::_pass" in " ".join(worker.cmdline()):
                logs = [Path(file.path) for file in worker.open_files() if file.path.endswith("metrics.jsonl")]
                kept = [list(log.parent.glob("checkpoints/epoch-*[1-9]*/optimizer.pt")) for log in logs]
                if len(logs) == 2 and all(kept):
                    return worker, logs
    return None


def until(what, process: subprocess.Popen):
    """The first true answer of `what`, asked while `process` runs."""
    end = time.monotonic() + ENOUGH
    while not (found := what()):
        assert process.poll() is None and time.monotonic() < end, "it never came to that"
        time.sleep(0.02)
    return found


def test_a_node_is_killed_and_the_sweep_ends_as_on_one_machine(cluster, recipe, tmp_path, one_thread, monkeypatch):
    # An address of its own, so that the driver, which asks a node of its own address, is not killed with it.
    node = cluster.add_node(node_ip_address="127.0.0.2", **NODE)
    raylet = node.all_processes["raylet"][0].process.pid
    root, local = tmp_path / "ray", tmp_path / "local"
    line = [sys.executable, "-m", "mini_symposium", "sweep", "--recipe", recipe, "--engine", "ray", "--out", str(root)]
    line += ["--learning-rates", "1e-3,1e-4", "--ranks", "2,4:8", "--seeds", "1", "--epochs", str(EPOCHS)]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address, "COLUMNS": "200"}
    with subprocess.Popen(
        [*line, "--per-pass", "2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as driver:
        try:
            worker, logs = until(lambda: halfway(raylet), driver)
            cluster.remove_node(node, allow_graceful=False)
            with suppress(psutil.NoSuchProcess):  # it may have gone with its node
                worker.kill()
            before = {log: log.read_text().splitlines() for log in logs}
            said, _ = driver.communicate(timeout=ENOUGH)
        finally:
            driver.kill()
    assert driver.returncode == 0, said
    assert "4 of 4 experiments are finished" in said and "the ledger: " in said
    after = lines(root)
    for name, log in after.items():
        assert [json.loads(each)["step"] for each in log] == list(range(1, EPOCHS * ROWS + 1)), name
    for log, some in before.items():
        assert ROWS <= len(some) < EPOCHS * ROWS  # it was under way
        assert log.read_text().splitlines()[:ROWS] == some[:ROWS]  # seconds included: it did not begin again
    assert {each.name for each in load_evidence(root).trained} == {name.removesuffix("-seed-1") for name in after}
    assert len(after) == 4 and [row.id for row in judge(load_evidence(root))][-1] == "C12"

    said = []
    table = run_grid(recipe, str(local), **GRID, say=said.append)
    assert f"{2 * EPOCHS * ROWS} adapter steps ahead, " in said[1] and " s each, about" in said[1]
    assert len(table) == 4 and results(root) == results(local)

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # nothing is left to do, so nobody is asked
    assert run_grid(recipe, str(root), **GRID, engine="ray").equals(table) and lines(root) == after


def test_a_node_that_dies_is_named_and_its_pass_ends_elsewhere(cluster, tmp_path, monkeypatch):
    """The other pass lasts until the driver has noticed, however long that takes."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    cluster.add_node(node_ip_address="127.0.0.2", **NODE)
    heard, finished, said = tmp_path / "heard", [], []

    def work(number: int, patience: float) -> None:
        with (tmp_path / str(number)).open("a") as log:
            print(ray_engine._imported().util.get_node_ip_address(), file=log)
        if (tmp_path / str(number)).read_text() == "127.0.0.2\n":
            os.kill(os.getppid(), signal.SIGKILL)
        end = time.monotonic() + ENOUGH
        while not heard.exists() and time.monotonic() < end:
            time.sleep(0.02)

    def say(line: str) -> None:
        said.append(line)
        if "is gone" in line:
            heard.touch()

    ray_engine.run([(0,), (1,)], work, lambda number, _: finished.append(number), say)
    assert said[0] == "Ray: passes 2, nodes 2, cores 2"
    assert said[1:] == ["node 127.0.0.2 is gone; its passes resume elsewhere from their checkpoints"]
    assert sorted(finished) == [0, 1]
    places = sorted((tmp_path / str(number)).read_text().split()[0] for number in finished)
    assert places[0] == "127.0.0.2" != places[1]


def test_what_is_wrong_is_said_as_on_one_machine(cluster, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    run = RunDirectory(tmp_path / "lr-1e-03-rank-2-alpha-4-constant-seed-1")
    finetune.record_recipe(run, load_recipe(recipe, seed=7), fingerprint(load_examples(load_recipe(recipe).dataset)))
    ask = {
        "recipe": recipe,
        "out": str(tmp_path),
        "learning_rates": [1e-3],
        "ranks": [2],
        "seeds": [1],
        "engine": "ray",
    }
    with pytest.raises(InputError, match=r"^[^\n]*this run was made with another [^\n]*$"):
        run_grid(**ask)
    with pytest.raises(InputError, match="--cpus 99: no node of the cluster has more than 1"):
        run_grid(**ask, cpus=99)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(InputError, match=r"RAY_ADDRESS=127\.0\.0\.1:1: no cluster answers there"):
        run_grid(**ask)


def test_a_successor_waits_for_one_that_only_seems_dead(tmp_path, monkeypatch):
    recipe = load_recipe("tiny")
    (some,) = grid(recipe, [1e-3], [2], epochs=1)
    monkeypatch.setattr(finetune, "PATIENCE", 0.0)
    some = [training.below(tmp_path) for training in some]
    run = some[0].run
    hold = "import sys, time, pathlib\nfrom mini_symposium.files.writing import alone\n"
    hold += (
        "with alone(pathlib.Path(sys.argv[1]), '.training.lock'):\n    print('held', flush=True)\n    time.sleep(3)\n"
    )
    examples = load_examples(find("data/minisymposium.md"))[:2]
    with subprocess.Popen([sys.executable, "-c", hold, str(run)], stdout=subprocess.PIPE, text=True) as zombie:
        assert zombie.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another process works here"):
            train_experiments(some, examples, examples, 0.0)
        assert not RunDirectory(run).recipe_file.exists()
        train_experiments(some, examples, examples, ray_engine.PATIENCE)
        assert zombie.poll() is not None or zombie.wait(5) == 0
    assert RunDirectory(run).checkpoints(1e-3).keys() == {0, 1}


def test_a_folder_that_a_node_does_not_see_is_refused(tmp_path):
    with pytest.raises(InputError, match="share the sweep's folder"):
        train_experiments([Training.of(load_recipe("tiny"), tmp_path / "elsewhere" / "run")], [], [])


def test_without_ray_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"Ray is not installed; `pip install -e '.\[ray\]'` adds it"):
        ray_engine.run([], print, print)
