import os
import subprocess
import sys
from pathlib import Path

import pytest

from mini_symposium.errors import InputError
from mini_symposium.run import ROOT, RunDirectory, find, read_jsonl


@pytest.mark.parametrize("rate", [1e-7, 1e-5, 2.5e-5, 0.001, 1.0, 3.3333333333e-6])
def test_folder_name_of_a_learning_rate_parses_back(tmp_path, rate):
    run = RunDirectory(tmp_path)
    run.learning_rate_dir(rate).mkdir()
    assert run.learning_rates() == [rate]


def test_folder_names_are_short():
    assert RunDirectory("x").learning_rate_dir(1e-5).name == "lr-1e-05"
    assert RunDirectory("x").learning_rate_dir(2.5e-5).name == "lr-2.5e-05"


def test_a_line_cut_by_a_crash_is_left_out_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2"):
        read_jsonl(path)


def test_results_of_one_notebook_leave_the_others_alone(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.record("02_finetune", {"steps": 3})
    run.record("01_dataset", {"n": 13})
    run.record("02_finetune", {"steps": 4})
    assert run.results() == {"01_dataset": {"n": 13}, "02_finetune": {"steps": 4}}


def test_data_is_found_from_any_directory(elsewhere):
    assert find("data/README.md").is_file()


def test_a_path_is_the_users_and_only_what_ships_is_found_elsewhere(elsewhere, monkeypatch):
    assert RunDirectory("runs/x").path == Path.cwd() / "runs" / "x"
    assert find("figures/proxy").is_dir() and not find("README.md").exists() and not find("notebooks/x").exists()
    monkeypatch.chdir(ROOT / "notebooks")  # where Jupyter starts a notebook's kernel
    assert RunDirectory("runs/x").path == ROOT / "runs" / "x"


def test_an_installed_package_brings_recipes_data_and_notebooks(wheel, tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    subprocess.run([*pip, "--target", str(tmp_path / "site"), str(wheel)], check=True)
    code = (
        "from mini_symposium.cli.main import main; from mini_symposium.run import ROOT; import sys\n"
        "assert ROOT.parts[-2:] == ('mini_symposium', 'shipped'), ROOT\n"
        "from mini_symposium import load_examples, load_recipe\n"
        "print(len(load_examples(load_recipe('proxy').dataset)), len(load_examples('data/twins.md')))\n"
        "main(['notebooks', 'mine'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("13 ")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == sorted(
        path.name for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")
    )


def test_importing_the_package_loads_no_torch():
    code = "import mini_symposium, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_checkpoints_on_the_way_are_near_a_third_and_two_thirds(tmp_path):
    run = RunDirectory(tmp_path)

    def kept(rate, *epochs):
        for epoch in epochs:
            (run.learning_rate_dir(rate) / "checkpoints" / f"epoch-{epoch:04d}").mkdir(parents=True)
        return run.intermediate_epochs(rate)

    assert kept(1e-3, *range(0, 31, 3)) == [9, 21]
    assert kept(1e-4, 0, 5, 10) == [5]
    assert kept(1e-5, 0, 10) == kept(1e-6) == []
