import json
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import command

from mini_symposium.errors import InputError
from mini_symposium.reproduce.publish import clean, publish
from mini_symposium.run import ROOT, RunDirectory


def test_a_published_run_is_clean_and_redraws_the_same(tiny_run, tmp_path):
    written = publish(tiny_run, tmp_path)
    names = {path.relative_to(tmp_path).as_posix() for path in written}
    assert {f"notebooks/{path.name}" for path in tiny_run.notebooks.glob("0*.ipynb")} <= names
    assert {"figures/tiny/results.json", "figures/tiny/lr-1e-06/metrics.jsonl"} <= names
    for path in (tmp_path / "notebooks").iterdir():
        text = path.read_text(encoding="utf-8")
        assert str(tiny_run.path) not in text
        assert "injected-parameters" not in text
        assert "widget" not in text

    from mini_symposium.figures.redraw import redraw

    before = {path.name: path.read_bytes() for path in tiny_run.figures.iterdir()}
    redraw(RunDirectory(tmp_path / "figures" / "tiny"))
    after = {path.name: path.read_bytes() for path in (tmp_path / "figures" / "tiny" / "figures").iterdir()}
    assert after == before


def test_committed_figures_are_those_of_the_committed_data_drawn_without_torch(tmp_path):
    """What `make figures` draws, but for the bench's picture: tests/bench/ has that."""
    shutil.copytree(ROOT / "figures", tmp_path / "figures")
    before = {path: path.read_bytes() for path in (tmp_path / "figures").rglob("*") if path.is_file()}
    drawn = [tmp_path / "figures" / name for name in ("proxy", "claims")]
    blocked = "import sys; sys.modules['torch'] = None; from mini_symposium.cli.main import main; main(sys.argv[1:])"
    line = [sys.executable, "-c", blocked, "figures", *map(str, drawn)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) >= 12
    after = {path: path.read_bytes() for path in (tmp_path / "figures").rglob("*") if path.is_file()}
    assert [path for path in before if after.get(path) != before[path]] == []
    assert after.keys() == before.keys()


def test_a_path_of_this_machine_is_not_published():
    output = nbformat.v4.new_output("stream", text="saved to /home/ada/runs/proxy\n")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[output])])
    with pytest.raises(InputError, match="an output names /home/ada/runs/proxy"):
        clean(notebook)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_committed_notebooks_are_clean_and_say_their_scale(path):
    notebook = nbformat.read(path, as_version=4)
    before = json.dumps(notebook)
    assert json.dumps(clean(notebook)) == before
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "proxy scale: SmolLM2-135M-Instruct" in text


def test_nothing_to_publish_is_said(tmp_path):
    with pytest.raises(InputError, match="no executed notebooks"):
        publish(RunDirectory(tmp_path), tmp_path)


@pytest.mark.parametrize("text", ["{}", "[]", "{"])
def test_a_copy_that_is_no_notebook_is_named(text, tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.notebooks.mkdir(parents=True)
    (run.notebooks / "01_dataset.ipynb").write_text(text)
    with pytest.raises(InputError, match=r"01_dataset\.ipynb: no notebook"):
        publish(run, tmp_path / "root")


@pytest.mark.parametrize(
    ("name", "text"),
    [("results.json", '{"02_finetune": 3}'), ("figures/survival.csv", ""), ("figures/recitation.csv", "a\n1\n")],
)
def test_a_run_with_a_damaged_file_is_not_drawn_but_named(name, text, tmp_path):
    shutil.copytree(ROOT / "figures" / "proxy", tmp_path / "proxy")
    (tmp_path / "proxy" / name).write_text(text)
    done = command("figures", tmp_path / "proxy", check=False)
    assert done.returncode == 2 and "cannot be drawn again" in done.stderr and "Traceback" not in done.stderr
