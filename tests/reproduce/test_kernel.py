"""Any error in a cell ends the run at that cell, even if caught; copies hold no secrets; progress is shown."""

import io
import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from rich.console import Console

from mini_symposium.errors import InputError, RunError
from mini_symposium.reproduce.kernel import Notebook, NotebookError, execute, view
from mini_symposium.run import RunDirectory


def run_cells(folder: Path, *cells: str, tags: tuple = (), console: Console | None = None) -> Path:
    """Execute a notebook of these cells, the first with `tags`; return the folder of its copy."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.cells[0].metadata["tags"] = list(tags)
    nbformat.write(notebook, folder / "01_x.ipynb")
    run = RunDirectory(folder / "run")
    with view(console or Console(file=io.StringIO())) as show:
        execute(Notebook(folder / "01_x.ipynb", {}, ""), {}, {}, run, show)
    return run.notebooks


WIDGETS = "from ipywidgets import Button, Output\n"
FAILURES = {
    "plain": ("1 / 0", r"01_x, cell 1/2 `1 / 0`: ZeroDivisionError: division by zero"),
    "output": (f"{WIDGETS}with Output():\n    1 / 0", "cell 1/2 `from ipywidgets.*: ZeroDivisionError"),
    "cleared": (f"{WIDGETS}with Output() as o:\n    1 / 0\no.clear_output()", "ZeroDivisionError"),
    "captured callback": (
        f"{WIDGETS}button, out = Button(), Output()\nbutton.on_click(out.capture()(lambda _: 1 / 0))\nbutton.click()",
        "cell 1/2 `from ipywidgets.*ZeroDivisionError",
    ),
    "callback": (f"{WIDGETS}button = Button()\nbutton.on_click(lambda _: 1 / 0)\nbutton.click()", "ZeroDivisionError"),
    "exit": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "quit": ("quit()", "SystemExit: the cell called exit"),
    "death": ("import os; os._exit(0)", "cell 1/2 `import os; os._exit.*: Kernel died"),
    "tag": ("raise KeyError('tagged')", "KeyError: 'tagged'"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_whatever_goes_wrong_in_a_cell_fails(tmp_path, kind):
    cell, message = FAILURES[kind]
    tags = ("raises-exception",) if kind == "tag" else ()
    with pytest.raises(NotebookError, match=rf"{message}.*; see .*run/notebooks/01_x\.failed\.ipynb$") as caught:
        run_cells(tmp_path, cell, f"open({str(tmp_path / 'went on')!r}, 'w')", tags=tags)
    assert isinstance(caught.value, RunError)
    assert not (tmp_path / "went on").exists()
    assert [path.name for path in (tmp_path / "run" / "notebooks").iterdir()] == ["01_x.failed.ipynb"]
    failed = json.loads((tmp_path / "run" / "notebooks" / "01_x.failed.ipynb").read_text())
    if kind in ("plain", "output", "captured callback"):
        outputs = failed["cells"][0]["outputs"]
        assert [output["ename"] for output in outputs if "ename" in output] == ["ZeroDivisionError"]


def test_a_reply_that_comes_while_an_output_widget_is_told_of_is_not_missed(tmp_path):
    """Without the check every second, neither this notebook nor one of 400 such cells finished."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom mini_symposium.reproduce.kernel import Notebook, execute\n"
        "from mini_symposium.run import RunDirectory\n"
        "execute(Notebook(Path(sys.argv[1]), {}, ''), {}, {}, RunDirectory(sys.argv[2]), lambda *_: None)"
    )
    cells = ["from ipywidgets import Output", *["with Output():\n    print(1)"] * 30]
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]), tmp_path / "01_x.ipynb"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "01_x.ipynb", tmp_path / "run"], check=True, timeout=180)


def test_bad_input_found_in_a_cell_stays_bad_input_and_a_repaired_notebook_leaves_no_trace(tmp_path):
    cell = "from mini_symposium.errors import InputError\nraise InputError('data/mine.md:41: too long; cut it')"
    with pytest.raises(InputError, match=r"^data/mine\.md:41: too long; cut it \(01_x, cell 1/1 `from"):
        run_cells(tmp_path, cell)
    assert [path.name for path in run_cells(tmp_path, "print('good')").iterdir()] == ["01_x.ipynb"]


def test_view_names_the_cells_and_the_kernels_own_noise_stays_out_of_it(tmp_path, capfd):
    noise = "import os, sys\nos.write(1, b'NOISE')\nos.write(2, b'NOISE')\nos.system('echo NOISE >&2')\nprint('NOISE')"
    cells = ["# Look at [bold]the data\n1 + 1", noise]
    lines, live = io.StringIO(), io.StringIO()
    run_cells(tmp_path, *cells, console=Console(file=lines, width=40))
    assert "01_x 1/2 Look at [bold]the data\n" in lines.getvalue()
    run_cells(tmp_path, *cells, console=Console(file=live, width=120, force_terminal=True))
    assert "Look at [bold]the data" in live.getvalue()
    assert "2/2 done" in live.getvalue()
    printed = capfd.readouterr()
    assert "NOISE" not in lines.getvalue() + live.getvalue() + printed.out + printed.err


def test_what_a_notebook_prints_of_the_environments_secrets_does_not_stay_in_its_copy(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    cell = "import os\nprint(os.environ['HF_TOKEN'])\nprint({**os.environ})\nos.environ['HF_TOKEN']"
    with pytest.raises(NotebookError, match="ZeroDivisionError"):
        run_cells(tmp_path, cell, "1 / len('') if os.environ['HF_TOKEN'] else 0")
    [copy] = (tmp_path / "run" / "notebooks").iterdir()
    assert "***" in copy.read_text()
    with pytest.raises(NotebookError, match=r"ValueError: \*\*\*"):
        run_cells(tmp_path, cell, "raise ValueError(os.environ['HF_TOKEN'])")
    assert not any(b"hf_abc" in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
