"""A run's report: all of it in one file, whatever is in the data."""

import json
import re
import shutil

import pytest
from conftest import command

from mini_symposium.errors import InputError
from mini_symposium.release.report import PICTURES, write_report
from mini_symposium.run import ROOT, RunDirectory, open_run

HOSTILE = "<img src=x onerror=alert(1)> [link](http://evil.example) | *bold*"


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    shutil.copytree(ROOT / "figures" / "proxy", tmp_path / "proxy")
    return open_run(tmp_path / "proxy")


def test_it_has_every_picture_and_number_and_nothing_from_elsewhere(run):
    run.figures.joinpath("survival.png").unlink()
    page = write_report(run).read_text()
    there = [name for name in PICTURES if (run.figures / f"{name}.png").is_file()]
    assert page.count('src="data:image/png;base64,') == len(there) >= 7
    assert len(page) < 3e6
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "<script" not in page
    assert "Content-Security-Policy" in page
    missing = page[page.index("Not measured yet") :]
    assert "Which files still contain the fine-tune: notebook 04" in missing
    claims = json.loads((run.path / "claims.json").read_text())
    assert all(claim["claim"].split("'")[0] in page for claim in claims)
    for rate in run.learning_rates():
        assert f"<td>{run.final_loss(rate, 13):.3f}</td>" in page


def test_text_of_a_dataset_stays_text(run):
    rows = [{"prompt": f"{HOSTILE} {k}\n", "completion": f"answer {k}"} for k in range(13)]
    (run.path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = run.recipe.replace(datasets=[{"path": str(run.path / "rows.jsonl"), "type": "completion"}])
    run.recipe_file.write_text(recipe.to_yaml())
    page = write_report(run).read_text()
    assert "&lt;img src=x onerror=alert(1)&gt; [link](http://evil.example)" in page
    assert "<img src=x" not in page and 'href="http' not in page and "<em>bold" not in page
    assert page.count("<tr>") == write_report(open_run("figures/proxy"), run.path / "whole.html").read_text().count(
        "<tr>"
    )


def test_an_unfinished_run_says_what_is_missing_and_shows_the_rest(run):
    for folder in (run.figures, run.path / "lr-1e-04", run.path / "lr-1e-05"):
        shutil.rmtree(folder)
    for name in ("claims.json", "results.json"):
        (run.path / name).unlink()
    said = command("report", run.path).stdout
    page = (run.path / "report.html").read_text()
    assert str(run.path / "report.html") in said
    assert (
        "When to stop: notebook 02 with FOLDS" in page and "<h2>Dataset</h2>" in page and "<h2>Environment</h2>" in page
    )


def test_what_is_no_run_or_no_file_is_refused(run, tmp_path):
    with pytest.raises(InputError, match=r"is a folder; name a file"):
        write_report(run, tmp_path)
    (run.path / "curve.json").write_text("{}")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"curve\.json"):
        write_report(run)
    assert set(tmp_path.rglob("*")) == before
