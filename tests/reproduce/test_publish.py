import json

import nbformat
import pytest

from mini_symposium.errors import InputError
from mini_symposium.figures.redraw import redraw
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

    before = {path.name: path.read_bytes() for path in tiny_run.figures.iterdir()}
    redraw(RunDirectory(tmp_path / "figures" / "tiny"))
    after = {path.name: path.read_bytes() for path in (tmp_path / "figures" / "tiny" / "figures").iterdir()}
    assert after == before


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
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == [*range(1, len(counts) + 1)]
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
    with pytest.raises(InputError, match=r"01_dataset\.ipynb: not a notebook"):
        publish(run, tmp_path / "root")
