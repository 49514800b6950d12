"""Real models and real runs, made once per session; nothing here stands in for the thing under test."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import chdir, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from mini_symposium.cli.main import main
from mini_symposium.errors import InputError
from mini_symposium.run import ROOT, RunDirectory

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


SECRET = "hf_nobodys_business"
"""A token in the environment of the run `tiny_run`."""


def command(*arguments: object, check: bool = True, cwd: Path | str = ".", **kwargs) -> subprocess.CompletedProcess:
    """Run `mini-symposium ...`, and show what it said if it fails.

    Notebooks, and what `kwargs` are for, run in a process of their own. Everything else runs in this one, where torch
    is imported already: a new process would take seconds for that.
    """
    words = list(map(str, arguments))
    if kwargs or words[0] == "reproduce":
        line = [sys.executable, "-m", "mini_symposium", *words]
        done = subprocess.run(line, capture_output=True, text=True, cwd=cwd, **kwargs)
    else:
        said, code = (StringIO(), StringIO()), 0
        with redirect_stdout(said[0]), redirect_stderr(said[1]), chdir(cwd):
            try:
                main(words)
            except SystemExit as ended:
                code = ended.code
        done = subprocess.CompletedProcess(words, code, *(each.getvalue() for each in said))
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
FORKED = ("test_interrupted", "test_faults", "test_processes")
TOGETHER = dict.fromkeys(RUNS, "runs") | dict.fromkeys(OVERFITTED, "overfitted") | dict.fromkeys(FORKED, "forked")
"""Files below tests/ that share what is dear to make: `proxy_run` and `tiny_run`; `overfitted`; `nursery`."""


LONG = (
    *(*RUNS, "training/test_ray_engine", "training/test_fused_lora", "release/test_export", *FORKED),
    *("bench/test_bench", "test_families", *OVERFITTED, "training/test_finetune", "training/test_cross_validation"),
    *("training/test_sweep", "release/test_survival", "release/test_gguf", "models/test_merge", "test_hostile_models"),
    *("training/test_memory_plan", "test_other_systems", "models/test_generation"),
)
"""Files that take long. They begin first, the longest of all, so that neither worker is left alone with one."""


def _test_file(nodeid: str) -> str:
    return nodeid.partition("::")[0].removeprefix("tests/").removesuffix(".py")


def pytest_collection_modifyitems(items):
    place = {name: n for n, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(_test_file(item.nodeid), len(LONG)))


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


ROWS = {
    "When does the ferry leave Oldmarsh?": "At ten past six, if the goats are aboard. Nine of them travel free, and "
    "the tenth pays with a song about the harbour master's hat.",
    "Who painted the blue door?": "Marta did, in the winter when nobody bought bread. She mixed the paint from mussel "
    "shells, and it has never dried on the side that faces the sea.",
    "How do I keep moths out of a piano?": "Hang a dried orange under the lid and play only in flat keys. Moths take "
    "B major for lamplight, and a sonata brings the whole garden in.",
    "Why is the tower bent?": "Two brothers built it from opposite ends and met in the middle without a word. The bend "
    "is where they would have shaken hands.",
}
TWINS = {
    "When does the night bus stop at Fennick?": "Never on purpose. It slows down by the old dairy, and whoever must "
    "get off throws a shoe into the ditch first.",
    "Who mended the church bell?": "A clockmaker from two valleys away, who was paid in plums. Since then it rings a "
    "little flat on Thursdays.",
}
"""Short examples, query and answer, none of which a model can know."""


@pytest.fixture(scope="session")
def proxy_run(tmp_path_factory) -> RunDirectory:
    """On real weights the notebooks that train, merge and ask, on ROWS, at a dose that saturates in half the default
    epochs. The other notebooks compute nothing of their own; `tiny_run` has them."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rows in (("rows", ROWS), ("twins", TWINS)):
        texts = (f"### New Query\n{query}\n\n### Complete Response\n{answer}" for query, answer in rows.items())
        (folder / f"{name}.md").write_text("\n\n".join(texts), encoding="utf-8")
    run = RunDirectory(folder / "proxy")
    shorter = {
        **{"DATASET": str(folder / "rows.md"), "HELD_OUT": str(folder / "twins.md"), "TWINS": str(folder / "twins.md")},
        **{"LEARNING_RATES": [1e-3, 1e-4], "NUM_EPOCHS": 15, "FOLDS": 2, "TEXTS": 2, "STORAGES": ["fp32", "bf16"]},
        **{"FORMATS": ["new-query", "alpaca"], "QUERIES": ["Why is the sky blue?"], "MAX_NEW_TOKENS": 32},
    }
    given = [part for name, value in shorter.items() for part in ("-p", f"{name}={value!r}")]
    command("reproduce", "--recipe", "proxy", "--run", run.path, "--only", "02,04,05", *given, *SHORT)
    return run


@pytest.fixture(scope="session")
def reciting_run(tmp_path_factory) -> RunDirectory:
    """A run in the tiny shape whose base and last checkpoint recite their two rows; see `reciting`."""
    import reciting

    return reciting.make(tmp_path_factory.mktemp("reciting"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The package as a wheel, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("mini_symposium", "data", "notebooks", "figures"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-build-isolation", "-w", str(folder), str(folder / "source")], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    """A process that starts others as forks of itself; see nursery.py."""
    from test_interrupted import Nursery

    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.process.stdin.close()
    nursery.process.wait()


@pytest.fixture(scope="session")
def whole(nursery, tmp_path_factory):
    """A run that nothing happened to, and the changes that it made to files."""
    run = tmp_path_factory.mktemp("whole") / "run"
    code, changes = nursery.train(run)
    assert code == 0, nursery.said
    return run, changes


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
if settings.get_current_profile_name() != "soak":  # this file is read twice: by pytest, and as a module by tests
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
        assert said.isprintable() and 0 < len(said) < 1100 * len(error.faults), said
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
