"""What is mistyped in `mini-symposium sweep` is refused before anything is made."""

import re
from dataclasses import replace

import pytest
from conftest import command
from made_evidence import SEEDS, evaluation, evidence, trained

from mini_symposium.claims.registration import REGISTERED


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--learning-rates", "fast"], "--learning-rates fast: takes numbers, as in 1e-3,1e-4"),
        (["--ranks", "4:x"], "--ranks 4:x: takes r or r:alpha"),
        (["--ranks", "4", "--schedules", "step"], "is one of constant, constant_with_warmup, cosine, linear"),
        (["--ranks", "4", "--seeds", "1,1"], "--seeds: 1 more than once"),
        (["--epochs", "3"], "--epochs: is for a grid"),
        (["--measure", "rows"], "--measure rows: is all, recitation or nothing"),
        (["--ranks", "4", "--engine", "slurm"], "--engine slurm: is one of local, ray"),
    ],
)
def test_a_mistyped_grid_is_one_line_and_touches_nothing(tmp_path, arguments, said):
    done = command("sweep", "--recipe", "tiny", "--out", tmp_path / "s", *arguments, check=False)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_a_mistyped_experiment_or_seed_is_refused(tmp_path):
    done = command("sweep", "--out", tmp_path / "s", "--only", "hihg", check=False)
    assert done.returncode == 2 and "the experiments are high, low" in done.stderr
    done = command("sweep", "--out", tmp_path / "s", "--seeds", "one", check=False)
    assert done.returncode == 2 and "takes whole numbers" in done.stderr
    assert not (tmp_path / "s").exists()


def test_the_plan_tells_what_is_left_and_trains_nothing(tmp_path):
    said = command("sweep", "--recipe", "proxy", "--out", tmp_path / "s", "--plan").stdout
    assert "16,380" in said and "1,050 s" not in said  # three seeds of 420 epochs of 13 rows
    assert "hours of steps at 0.31 s" in said and not (tmp_path / "s").exists()


def test_evidence_of_another_registration_is_gathered_anew(tmp_path):
    done = command("sweep", "--beside", "figures/claims/exploratory", "--plan", check=False)
    assert done.returncode == 2 and re.search("gathered under no registration .*gather it anew", done.stderr)
    done = command("sweep", "--recipe", "tiny", "--beside", "figures/claims/exploratory", "--plan", check=False)
    assert done.returncode == 2 and "is of SmolLM2-135M-Instruct, the sweep of" in done.stderr
    done = command("sweep", "--ranks", "4", "--plan", check=False)
    assert done.returncode == 2 and "not for a grid" in done.stderr


def test_what_earlier_evidence_has_whole_is_not_gathered_again(tmp_path):
    some = [trained("high", seed=seed, epochs=100, evaluations={30: evaluation(), 100: evaluation()}) for seed in SEEDS]
    some.append(trained("low", seed=42, epochs=420))  # not evaluated
    whole = replace(evidence(*some, base_model="SmolLM2-135M-Instruct"), registration=REGISTERED.sha256)
    whole.save(tmp_path / "part")
    said = command("sweep", "--out", tmp_path / "s", "--beside", tmp_path / "part", "--plan").stdout
    assert re.search(r"low .*42, 43, 44", said) and not re.search(r"│ high", said)
    done = command("sweep", "--out", tmp_path / "s", "--beside", tmp_path / "part", "--plan", "--only", "high")
    assert "55,170 adapter steps and 3 evaluations" in done.stdout  # the plan is always whole


def test_a_forecast_by_size_is_for_the_kits_own_rows(tmp_path):
    said = command("forecast", "--recipe", "paper", "--by-size").stdout
    assert "7.2 B parameters" in said and "1e-06" in said and "1e-07" in said
    done = command("forecast", "--recipe", "paper", "--by-size", "--dataset", "data/twins.md", check=False)
    assert done.returncode == 2 and "leave out --dataset" in done.stderr
