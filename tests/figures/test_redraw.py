"""What was committed of a run draws its figures again, to the byte and without torch."""

import shutil
import subprocess
import sys

import pandas as pd
import pytest
from made_evidence import evaluation, evidence, trained

from mini_symposium.errors import InputError
from mini_symposium.figures.redraw import redraw
from mini_symposium.run import ROOT, RunDirectory


def test_committed_figures_are_those_of_the_committed_data_drawn_without_torch(tmp_path):
    """What `make figures` draws, but for the bench's picture: tests/bench/ has that."""
    shutil.copytree(ROOT / "figures", tmp_path / "figures")
    before = {path: path.read_bytes() for path in (tmp_path / "figures").rglob("*") if path.is_file()}
    drawn = [tmp_path / "figures" / name for name in ("proxy", "claims", "curve", "examples")]
    blocked = "import sys; sys.modules['torch'] = None; from mini_symposium.cli.main import main; main(sys.argv[1:])"
    line = [sys.executable, "-c", blocked, "figures", *map(str, drawn)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) >= 12
    after = {path: path.read_bytes() for path in (tmp_path / "figures").rglob("*") if path.is_file()}
    assert [path for path in before if after.get(path) != before[path]] == []
    assert after.keys() == before.keys()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results.json", '{"02_finetune": 3}'),
        ("results.json", '{"02_finetune": {"travel": []}}'),
        ("figures/survival.csv", ""),
        ("figures/recitation.csv", "a\n1\n"),
    ],
)
def test_a_run_with_a_damaged_file_is_not_drawn_but_named(name, text, tmp_path):
    shutil.copytree(ROOT / "figures" / "proxy", tmp_path / "proxy")
    (tmp_path / "proxy" / name).write_text(text)
    with pytest.raises(InputError, match=r"proxy: cannot be drawn again from what is there \(.*\); run the notebooks"):
        redraw(RunDirectory(tmp_path / "proxy"))


def test_a_folder_with_nothing_of_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"recipe\.yml"):
        redraw(RunDirectory(tmp_path))


def test_saved_evidence_draws_its_ledger_and_the_contrasts_curves_the_same_each_time(tmp_path):
    told = [[None] * 12 + [epoch > 15] for epoch in range(30)]
    some = [trained("low", evaluations={600: evaluation()}), trained("high", extractable_32=told)]
    evidence(*some, trained("rank-4-alpha-8"), trained("cosine-peak")).save(tmp_path)
    written = redraw(RunDirectory(tmp_path))
    assert [path.name for path in written] == ["ledger.png", "memorization.png"]
    curves = pd.read_csv(tmp_path / "memorization.csv")
    assert set(curves["name"]) == {"low", "high"}
    high = curves[curves["name"] == "high"].set_index("epoch")["extractable_32"]
    assert (high[15], high[16]) == (0, 1)  # of the rows that are long enough
    before = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in redraw(RunDirectory(tmp_path))] == before


def test_a_folder_of_several_models_draws_all_their_curves(tmp_path):
    for name, base_model in (("proxy", "SmolLM2-135M-Instruct"), ("half", "Qwen2.5-Coder-0.5B-Instruct")):
        shutil.copytree(ROOT / "figures" / "curve" / "proxy", tmp_path / name)
        recipe = tmp_path / name / "recipe.yml"
        recipe.write_text(recipe.read_text().replace("SmolLM2-135M-Instruct", base_model))
    [written] = redraw(RunDirectory(tmp_path))
    assert written == tmp_path / "figures" / "overfitting.png"
    drawn = pd.read_csv(written.with_suffix(".csv"))
    assert list(drawn["model"].unique()) == ["proxy", "Qwen2.5-Coder-0.5B-Instruct"]
    before = written.read_bytes()
    assert redraw(RunDirectory(tmp_path)) == [written] and written.read_bytes() == before
    shutil.copytree(tmp_path / "half", tmp_path / "half-again")
    with pytest.raises(InputError, match="two runs of one model"):
        redraw(RunDirectory(tmp_path))
    (tmp_path / "half-again" / "curve.json").write_text("[]")
    with pytest.raises(InputError, match=r"half-again.curve\.json: "):
        redraw(RunDirectory(tmp_path))
    (tmp_path / "half-again" / "recipe.yml").unlink()
    with pytest.raises(InputError, match=r"half-again.recipe\.yml"):
        redraw(RunDirectory(tmp_path))
