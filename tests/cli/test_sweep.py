"""What is mistyped in `mini-symposium sweep` is refused before anything is made."""

import pytest
from conftest import command


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--learning-rates", "fast"], "--learning-rates fast: takes numbers, as in 1e-3,1e-4"),
        (["--ranks", "4:x"], "--ranks 4:x: takes r or r:alpha"),
        (["--ranks", "4", "--schedules", "step"], "is one of constant, constant_with_warmup, cosine, linear"),
        (["--ranks", "4", "--seeds", "1,1"], "--seeds: 1 more than once"),
        (["--epochs", "3"], "--epochs: is for a grid"),
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
