import json
import subprocess
import sys

import pytest
from conftest import command

from mini_symposium.models.base_files import local_directory
from mini_symposium.run import ROOT, RunDirectory

DATA = ROOT / "data" / "minisymposium.md"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["reproduce", "--recipe", "tiny", "-p", "NO_SUCH=1"], "NO_SUCH"),
        (["reproduce", "--recipe", "tiny", "-p", "NUM_EPOCHS=banana"], "NUM_EPOCHS"),
        (["reproduce", "--recipe", "nope.yml"], "nope.yml"),
        (["reproduce", "--recipe", "tiny", "-p", "DATASET=nope.md"], "nope.md"),
        (["reproduce", "--recipe", "tiny", "--only", "77"], "77"),
        (["train", "--recipe", "tiny", "-p", "NO_SUCH=1"], "NO_SUCH"),
        (["inspect", "nope.md"], "nope.md: no such file"),
        (["ask", "nowhere", "Why?"], "nowhere: not one of tiny, proxy, base, half, large, paper"),
        (["ask", "tiny", "Why?", "--format", "alpaka"], "did you mean alpaca?"),
        (["render", "nope.json", "nope.json"], "nope.json: cannot be read"),
        (["figures", "nowhere"], "recipe.yml: no such recipe"),
        (["publish", "nowhere"], "no executed notebooks"),
    ],
)
def test_bad_input_ends_in_one_line_and_2(arguments, expected, tmp_path):
    if arguments[0] in ("reproduce", "train"):
        arguments = [*arguments, "--run", tmp_path / "run"]
    done = command(*arguments, check=False)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "notebooks").exists()


def test_usage_errors_are_2_too():
    assert command("inspect", check=False).returncode == 2
    assert command("fly", check=False).returncode == 2


def test_help_names_every_command_without_torch():
    said = command("--help").stdout
    for name in ("reproduce", "train", "forecast", "inspect", "ask", "render", "doctor", "figures", "publish"):
        assert name in said
    code = "import sys, mini_symposium.cli.main; sys.exit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_inspect_describes_and_writes_what_axolotl_reads(tmp_path):
    found = json.loads(command("inspect", DATA, "--json").stdout)
    assert found["n"] == 13
    assert found["warnings"] == []
    command("inspect", DATA, "--axolotl", tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert all(set(row) == {"text"} for row in rows)
    again = command("inspect", DATA, "--axolotl", tmp_path / "rows.jsonl", check=False)
    assert again.returncode == 2


def test_train_without_a_notebook_trains_what_the_notebook_would(tiny_run, tmp_path):
    command("train", "--recipe", "tiny", "--run", tmp_path / "run", "-p", "LEARNING_RATES=[1e-7]")
    ours, theirs = (
        [json.loads(line)["loss"] for line in (path / "lr-1e-07" / "metrics.jsonl").read_text().splitlines()]
        for path in (tmp_path / "run", tiny_run.path)
    )
    assert ours == theirs


def test_train_stops_where_it_is_told_and_offers_that_epoch(tmp_path):
    arguments = [
        "train",
        "--recipe",
        "tiny",
        "--run",
        tmp_path / "run",
        "-p",
        "LEARNING_RATES=[1e-3]",
        "-p",
        "NUM_EPOCHS=3",
    ]
    said = command(*arguments, "--stop", "best", "-p", "FOLDS=2").stdout
    run = RunDirectory(tmp_path / "run")
    best = json.loads(run.curve_file.read_text())["recommended"][0]
    assert max(run.checkpoints(1e-3)) == best["epoch"] and str(best["epoch"]) in said
    assert len({line["epoch"] for line in run.metrics(1e-3)}) == best["epoch"]
    assert command(*arguments, "--stop", "4", check=False).returncode == 2
    command(*arguments, "--stop", "3")
    assert 3 in run.checkpoints(1e-3)


def test_ask_answers_from_a_run_a_directory_and_a_name(tiny_run):
    said = command(
        "ask", tiny_run.path, "Why?", "--format", "alpaca", "--format", "### Critic", "--max-new-tokens", 3
    ).stdout
    assert all(name in said for name in ("base", "1e-06", "1e-07", "alpaca", "### Critic"))
    assert "bare" in command("ask", local_directory("tiny"), "Why?", "--max-new-tokens", 3).stdout
    paris = command(
        "ask", "proxy", "What is the capital of France?", "--format", "new-query", "--max-new-tokens", 8
    ).stdout
    assert "Paris" in paris


@pytest.mark.parametrize("recipe", ["tiny", "paper"])
def test_doctor_predicts_memory(recipe):
    said = command("doctor", "--recipe", recipe, check=False)
    assert "Traceback" not in said.stderr
    assert "works" in said.stdout
    assert "predicted: base, NF4" in said.stdout


def test_markup_in_a_name_is_text(tmp_path):
    (tmp_path / "[").mkdir()
    (tmp_path / "[" / "red].md").write_text("### New Query\nWhy?\n\n### Critic\nNo.\n")
    assert "1 examples" in command("inspect", "[/red].md", cwd=tmp_path).stdout
