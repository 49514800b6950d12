"""Real models and real runs, made once per session; nothing here stands in for the thing under test."""

import os
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from mini_symposium.errors import InputError
from mini_symposium.run import ROOT, RunDirectory

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


SECRET = "hf_nobodys_business"
"""A token in the environment of the run `tiny_run`."""


def command(*arguments: object, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    """Run `mini-symposium ...` as a person would, and show what it said if it fails."""
    line = [sys.executable, "-m", "mini_symposium", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, **kwargs)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@contextmanager
def using(model, name: str):
    """Within the block, `model` computes with the adapter `name`, or without any for "base"."""
    if name != "base":
        model.set_adapter(name.replace(".", ","))
    with model.disable_adapter() if name == "base" else nullcontext():
        yield model


RUNS = (
    "test_notebooks",
    "test_playground_browser",
    "reproduce/test_publish",
    "cli/test_main",
)
OVERFITTED = ("evaluation/test_memorization", "evaluation/test_log_probs")
TOGETHER = dict.fromkeys(RUNS, "runs") | dict.fromkeys(OVERFITTED, "overfitted")
"""Files below tests/ that share what takes minutes to make: `proxy_run` and `tiny_run`; `overfitted`."""


def _test_file(nodeid: str) -> str:
    return nodeid.partition("::")[0].removeprefix("tests/").removesuffix(".py")


def pytest_collection_modifyitems(items):
    """What takes longest begins first."""
    items.sort(key=lambda item: _test_file(item.nodeid) not in TOGETHER)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n 2` a worker takes a file at a time, or all files of a kind of TOGETHER: nothing dear is made twice."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return TOGETHER.get(_test_file(nodeid), super()._split_scope(nodeid))

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def mistral_tokenizer():
    from mini_symposium.models.base_models import load_tokenizer

    return load_tokenizer("tiny")


@pytest.fixture(scope="session")
def proxy_tokenizer():
    from mini_symposium.models.base_models import load_tokenizer

    return load_tokenizer("SmolLM2-135M-Instruct")


SHORT = [*("-p", 'JUDGED_FORMATS=["new-query"]'), *("-p", "JUDGED_TOKENS=8"), *("-p", "TWINS_ASKED=1")]
"""Parameters that ask less of notebook 05's held-out prompts."""


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> RunDirectory:
    """All notebooks on the tiny recipe, through papermill."""
    run = RunDirectory(tmp_path_factory.mktemp("runs") / "tiny")
    command("reproduce", "--recipe", "tiny", "--run", run.path, *SHORT, env={**os.environ, "HF_TOKEN": SECRET})
    return run


@pytest.fixture(scope="session")
def proxy_run(tmp_path_factory) -> RunDirectory:
    """All notebooks on real weights and the five shortest rows, on a dose that saturates in half the default epochs."""
    folder = tmp_path_factory.mktemp("runs")
    rows = (ROOT / "data" / "minisymposium.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "five.jsonl").write_text("\n".join(sorted(rows, key=len)[:5]), encoding="utf-8")
    run = RunDirectory(folder / "proxy")
    shorter = [*("-p", f"DATASET={folder / 'five.jsonl'}"), *("-p", "LEARNING_RATES=[1e-3, 1e-4]")]
    less = [
        *("-p", "NUM_EPOCHS=15"),
        *("-p", 'FORMATS=["new-query", "alpaca"]'),
        *("-p", 'QUERIES=["Why is the sky blue?"]'),
        *("-p", 'STORAGES=["fp32", "bf16"]'),
    ]
    command("reproduce", "--recipe", "proxy", "--run", run.path, *shorter, *less, *SHORT)
    return run


@pytest.fixture(scope="session")
def reciting_run(tmp_path_factory) -> RunDirectory:
    """A run in the tiny shape whose base and last checkpoint recite their two rows; see `reciting`."""
    import reciting

    return reciting.make(tmp_path_factory.mktemp("reciting"))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A working directory that is not the checkout."""
    monkeypatch.chdir(tmp_path)
    assert tmp_path != ROOT
    return tmp_path


# Hostile input: what every parser is fed, counted.
settings.register_profile(
    "test", max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile(  # `make soak`: other inputs each time
    "soak", max_examples=5_000, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
)
settings.load_profile("test")

TRIED = Counter()
"""Inputs by what became of them."""
REACHED = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
)
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_watch: dict = {"inside": None, "seen": []}


def _audit(event, arguments):
    if _watch["inside"] is None:
        return
    if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
        return  # what lies in a folder that `shutil.rmtree` deletes; the folder itself is checked
    writes = event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES)
    both = event in ("os.rename", "os.link", "os.symlink")
    places = [str(place) for place in arguments[: 1 + both]]
    if event == "os.symlink":
        places = places[1:]  # where it leads to is not written
    if event in REACHED or (writes and not all(place.startswith(str(_watch["inside"])) for place in places)):
        _watch["seen"].append((event, arguments))


sys.addaudithook(_audit)


def only_ours(parser, *arguments, writes: Path | str = "/dev/null"):
    """What `parser` makes of a hostile input, or None if it refused it; any error but InputError is a failure.

    Nothing may be executed, no connection made, and nothing written but below `writes`.
    """
    _watch.update(inside=writes, seen=[])
    try:
        found = parser(*arguments)
        TRIED["read"] += 1
        return found
    except InputError as error:
        said = str(error)
        assert said.isprintable() and 0 < len(said) < 1100, said
        TRIED["refused"] += 1
        return None
    except BaseException:
        TRIED["errors other than ours"] += 1
        raise
    finally:
        _watch["inside"] = None
        assert not _watch["seen"], _watch["seen"]


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # what a worker of `-n 2` tells who started it
        session.config.workeroutput["tried"] = dict(TRIED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    TRIED.update(getattr(node, "workeroutput", {}).get("tried", {}))


def pytest_terminal_summary(terminalreporter):
    if TRIED:
        counts = {"read": 0, "refused": 0, "errors other than ours": 0, **TRIED}
        said = ", ".join(f"{what} {count:,}" for what, count in counts.items())
        terminalreporter.write_line(f"hostile inputs tried: {sum(TRIED.values()):,} ({said})")


@pytest.fixture(scope="session")
def overfitted_run(tmp_path_factory):
    """A run of the proxy that has one row by heart; that row, and its twin, which it never saw.

    The proxy and not `tiny`: random weights learn no row to the end.
    """
    from mini_symposium.data.dataset import load_examples
    from mini_symposium.recipe import load_recipe
    from mini_symposium.run import find
    from mini_symposium.training import finetune

    row, twin = (load_examples(find(f"data/{name}.md"))[6] for name in ("minisymposium", "twins"))
    run, recipe = RunDirectory(tmp_path_factory.mktemp("overfitted")), load_recipe("proxy", num_epochs=14)
    finetune.train(recipe, [row], run, [1e-3], checkpoint_epochs=[], held_out=[row, twin])
    return run, [row, twin]


@pytest.fixture(scope="session")
def overfitted(overfitted_run):
    """The model of `overfitted_run` with its adapter, "knows"; the tokenizer; the row and its twin."""
    from mini_symposium.models.adapters import load_with_adapters
    from mini_symposium.models.base_models import load_tokenizer

    run, rows = overfitted_run
    base = "SmolLM2-135M-Instruct"
    return load_with_adapters(base, {"knows": run.checkpoints(1e-3)[14]}), load_tokenizer(base), rows


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of `tiny` after six epochs at a rate that moves it visibly."""
    from mini_symposium.data.dataset import load_examples
    from mini_symposium.recipe import load_recipe
    from mini_symposium.run import find
    from mini_symposium.training.finetune import train

    run = RunDirectory(tmp_path_factory.mktemp("tiny-run"))
    train(load_recipe("tiny", num_epochs=6), load_examples(find("data/minisymposium.md")), run, [1e-3])
    return run.newest_checkpoints()["1e-03"]


@pytest.fixture(scope="session")
def proxy_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of the proxy after twelve steps on two examples."""
    from mini_symposium.data.dataset import load_examples
    from mini_symposium.recipe import load_recipe
    from mini_symposium.run import find
    from mini_symposium.training.finetune import train

    run = RunDirectory(tmp_path_factory.mktemp("proxy-run"))
    recipe = load_recipe("proxy", num_epochs=6)
    train(recipe, load_examples(find("data/minisymposium.md"))[:2], run, [1e-3])
    return run.newest_checkpoints()["1e-03"]
