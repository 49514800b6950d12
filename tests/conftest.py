"""Real models and real runs, made once per session; nothing here stands in for the thing under test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mini_symposium.run_directory import ROOT, RunDirectory

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def command(*arguments: object, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    """Run `mini-symposium ...` as a person would, and show what it said if it fails."""
    line = [sys.executable, "-m", "mini_symposium", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, **kwargs)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="session")
def mistral_tokenizer():
    from mini_symposium.base_models import load_tokenizer

    return load_tokenizer("tiny")


@pytest.fixture(scope="session")
def proxy_tokenizer():
    from mini_symposium.base_models import load_tokenizer

    return load_tokenizer("SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> RunDirectory:
    """All notebooks on the tiny recipe, through papermill."""
    run = RunDirectory(tmp_path_factory.mktemp("runs") / "tiny")
    command("reproduce", "--recipe", "tiny", "--run", run.path)
    return run


@pytest.fixture(scope="session")
def proxy_run(tmp_path_factory) -> RunDirectory:
    """All notebooks on real weights, on a dose that saturates in a third of the default epochs."""
    run = RunDirectory(tmp_path_factory.mktemp("runs") / "proxy")
    shorter = ["-p", "LEARNING_RATES=[1e-3, 1e-4]", "-p", "NUM_EPOCHS=9"]
    command("reproduce", "--recipe", "proxy", "--run", run.path, *shorter)
    return run


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A working directory that is not the checkout."""
    monkeypatch.chdir(tmp_path)
    assert tmp_path != ROOT
    return tmp_path


@pytest.fixture(scope="session")
def overfitted(tmp_path_factory):
    """The proxy with an adapter that has one row by heart; the tokenizer; that row, and its twin, which it never saw.

    The proxy and not `tiny`: random weights learn no row to the end.
    """
    from mini_symposium import finetune
    from mini_symposium.base_models import load_tokenizer
    from mini_symposium.dataset import load_examples
    from mini_symposium.generation import load_with_adapters
    from mini_symposium.recipe import load_recipe
    from mini_symposium.run_directory import find

    rows, twins = (load_examples(find(f"data/{name}.md")) for name in ("minisymposium", "twins"))
    run, recipe = RunDirectory(tmp_path_factory.mktemp("overfitted")), load_recipe("proxy", num_epochs=14)
    finetune.train(recipe, rows[6:7], run, [1e-3], checkpoint_epochs=[])
    model = load_with_adapters(recipe.base_model, {"knows": run.checkpoints(1e-3)[14]})
    return model, load_tokenizer(recipe.base_model), [rows[6], twins[6]]
