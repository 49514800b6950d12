import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from rich.console import Console

from mini_symposium.errors import InputError, RunError
from mini_symposium.reproduce.kernel import NotebookError
from mini_symposium.reproduce.notebooks import check_parameters, parse_parameters, print_summary, reproduce

SETTINGS = 'RECIPE = "proxy"\nRUN = ""\nDATASET = ""\nNUM_EPOCHS = 3  # passes\nRATES = []'
RECORD = "from mini_symposium.run import RunDirectory"
GIVEN = "{'given': [RECIPE, NUM_EPOCHS, RATES], 'python': sys.executable, 'ipython': os.environ['IPYTHONDIR']}"
FIRST = "# What we were given\nimport os, sys", f"{RECORD}\nRunDirectory(RUN).record('01_a', {GIVEN})"


def write_notebook(folder: Path, name: str, *cells: str, parameters: str = SETTINGS) -> Path:
    folder.mkdir(exist_ok=True)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in (parameters, *cells)])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    # No machine has this kernel: notebooks are run by the Python that runs us, whatever they name, if anything.
    if name == "01_a":
        notebook.metadata["kernelspec"] = {"name": "no-such-kernel", "display_name": "x", "language": "python"}
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder


def run_it(folder: Path, run: Path, **more) -> dict:
    given = {"recipe": "tiny", "run": run, "console": Console(file=io.StringIO(), width=300), **more}
    return reproduce(notebooks_dir=folder, **given)


def statuses(summary: dict) -> list[str]:
    return [f"{notebook['name'][:2]} {notebook['status']}" for notebook in summary["notebooks"]]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two notebooks: one records what it was given and where it ran, one reads what the first recorded."""
    write_notebook(tmp_path / "notebooks", "01_a", *FIRST)
    second = f"{RECORD}\nrun = RunDirectory(RUN)\nrun.record('02_b', {{'epochs': run.results()['01_a']['given'][1]}})"
    return write_notebook(tmp_path / "notebooks", "02_b", second, parameters='RUN = ""\nCOLOUR = "red"')


def test_notebooks_run_in_order_once_and_again_when_something_changed(folder, tmp_path, monkeypatch):
    poisoned = tmp_path / "jupyter" / "kernels" / "python3"
    poisoned.mkdir(parents=True)
    (poisoned / "kernel.json").write_text('{"argv": ["false"], "display_name": "x", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    run, parameters = tmp_path / "{braces} run", {"NUM_EPOCHS": 5, "RATES": (1e-3, 1e-4)}

    summary = run_it(folder, run, parameters=parameters)
    assert statuses(summary) == ["01 run", "02 run"]
    recorded = summary["results"]["01_a"]
    assert recorded["given"] == ["tiny", 5, [1e-3, 1e-4]]
    assert recorded["python"] == sys.executable
    assert not Path(recorded["ipython"]).exists()
    assert summary["results"]["02_b"] == {"epochs": 5}
    assert {path.name for path in (run / "notebooks").iterdir()} == {"01_a.ipynb", "02_b.ipynb"}
    assert all(Path(notebook["path"]).is_file() for notebook in summary["notebooks"])

    before = {path: path.read_bytes() for path in (run / "notebooks").iterdir()}
    assert statuses(run_it(folder, run, parameters=parameters)) == ["01 already there", "02 already there"]

    with pytest.raises(InputError, match=r"run: was made with NUM_EPOCHS=5, now 3; RATES=.*; pass --overwrite"):
        run_it(folder, run)
    with pytest.raises(InputError, match=r"was made with .*lora_r=4, now "):
        run_it(folder, run, parameters=parameters, recipe="proxy")
    other = tmp_path / "other.md"
    other.write_text("### New Query\nWhy?\n\n### Answer\nBecause.\n")
    for more in (
        {"parameters": {**parameters, "DATASET": str(other)}},
        {"only": ["02"], "parameters": {"DATASET": str(other)}},
    ):
        with pytest.raises(InputError, match="was made with another dataset"):
            run_it(folder, run, **more)
    assert {path: path.read_bytes() for path in (run / "notebooks").iterdir()} == before

    write_notebook(folder, "01_a", *FIRST, "2 + 2")
    assert statuses(run_it(folder, run, parameters=parameters)) == ["01 run", "02 run"]
    write_notebook(folder, "02_b", "1 + 1", parameters='RUN = ""\nCOLOUR = "red"')
    assert statuses(run_it(folder, run, parameters=parameters)) == ["01 already there", "02 run"]
    assert statuses(run_it(folder, run, parameters=parameters, only=["01"], overwrite=True)) == ["01 run"]
    # 02 is now older than what it was made after
    assert statuses(run_it(folder, run, parameters=parameters)) == ["01 already there", "02 run"]


def test_what_is_overwritten_goes_on_where_it_failed(tmp_path):
    ready = tmp_path / "ready"
    write_notebook(tmp_path / "n", "01_a", f"{RECORD}\nRunDirectory(RUN).record('01_a', {{}})", parameters='RUN = ""')
    write_notebook(tmp_path / "n", "02_b", f"open({str(ready)!r})", parameters='RUN = ""')
    run, both = tmp_path / "run", ["01 run", "02 run"]
    ready.touch()
    assert statuses(run_it(tmp_path / "n", run)) == both
    ready.unlink()
    with pytest.raises(NotebookError, match="FileNotFoundError"):
        run_it(tmp_path / "n", run, overwrite=True)
    ready.touch()
    assert statuses(run_it(tmp_path / "n", run, overwrite=True)) == ["01 already there", "02 run"]
    assert statuses(run_it(tmp_path / "n", run, overwrite=True)) == both
    assert not list(run.glob("overwriting*"))


def test_bad_input_is_said_at_once_and_touches_nothing(folder, tmp_path):
    def refused(match, **more):
        with pytest.raises(InputError, match=match):
            run_it(folder, tmp_path / "run", **more)

    refused(r"-p NO_SUCH: no such parameter in 01_a, 02_b; there is ", parameters={"NO_SUCH": 1})
    refused(r"-p num_epoch: .* there is NUM_EPOCHS$", parameters={"num_epoch": 1})
    refused("COLOUR: no such parameter in 01_a;", parameters={"COLOUR": "blue"}, only=["01"])
    refused("NUM_EPOCHS takes an int; found 'banana'", parameters={"NUM_EPOCHS": "banana"})
    refused("NUM_EPOCHS takes an int; found True", parameters={"NUM_EPOCHS": True})
    refused("RATES takes a list; found 0.1", parameters={"RATES": 0.1})
    refused("COLOUR takes a str; found 3; write -p 'COLOUR=\"3\"'", parameters={"COLOUR": 3})
    refused("num_epochs: -3: must be at least 1", parameters={"NUM_EPOCHS": -3})
    refused("nowhere.md: no such file", parameters={"DATASET": "nowhere.md"})
    refused("big: no such recipe", recipe="big")
    refused("--only 05, 09: no such notebook; there is 01, 02", only=["09", "02", "05"])
    assert not (tmp_path / "run").exists()
    assert check_parameters({"COLOUR": "blue"}, "02_b", notebooks_dir=folder) == {"COLOUR": "blue"}
    with pytest.raises(InputError, match="COLOUR: no such parameter in 01_a"):
        check_parameters({"COLOUR": "blue"}, "01_a", notebooks_dir=folder)


def test_parameters_are_literals_or_text():
    pairs = ["A=1e-7", "B=[1, 2]", "C=data/mine.md", "D=a=b", "E=", "F='3'"]
    assert parse_parameters(pairs) == {"A": 1e-7, "B": [1, 2], "C": "data/mine.md", "D": "a=b", "E": "", "F": "3"}
    for pair in ("A", "=1"):
        with pytest.raises(InputError, match=f"-p {pair}: takes NAME=VALUE"):
            parse_parameters([pair])


FAILURES = {
    "plain": ("1 / 0", r"01_x, cell 3/4 `1 / 0`: ZeroDivisionError: division by zero"),
    "output": ("with Output():\n    1 / 0", r"cell 3/4 `with Output\(\):`: ZeroDivisionError"),
    "cleared": ("with Output() as o:\n    1 / 0\no.clear_output()", "ZeroDivisionError"),
    "captured callback": (
        "button, out = Button(), Output()\nbutton.on_click(out.capture()(lambda _: 1 / 0))\nbutton.click()",
        "cell 3/4 `button, out = .*ZeroDivisionError",
    ),
    "callback": ("button = Button()\nbutton.on_click(lambda _: 1 / 0)\nbutton.click()", "ZeroDivisionError"),
    "exit": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "quit": ("quit()", "SystemExit: the cell called exit"),
    "death": ("import os; os._exit(0)", "cell 3/4 `import os; os._exit.*: Kernel died"),
    "tag": ("raise KeyError('tagged')", "KeyError: 'tagged'"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_whatever_goes_wrong_in_a_cell_fails(tmp_path, kind):
    cell, message = FAILURES[kind]
    folder = write_notebook(
        tmp_path / "n", "01_x", cell, f"open({str(tmp_path / 'went on')!r}, 'w')", parameters="A = 1"
    )
    notebook = nbformat.read(folder / "01_x.ipynb", 4)
    notebook.cells.insert(1, nbformat.v4.new_code_cell("from ipywidgets import Button, Output"))
    notebook.cells[2].metadata["tags"] = ["raises-exception"] * (kind == "tag")
    nbformat.write(notebook, folder / "01_x.ipynb")
    with pytest.raises(NotebookError, match=rf"{message}.*; see .*run/notebooks/01_x\.failed\.ipynb$") as caught:
        run_it(folder, tmp_path / "run")
    assert isinstance(caught.value, RunError)
    assert not (tmp_path / "went on").exists()
    assert [path.name for path in (tmp_path / "run" / "notebooks").iterdir()] == ["01_x.failed.ipynb"]
    failed = json.loads((tmp_path / "run" / "notebooks" / "01_x.failed.ipynb").read_text())
    if kind in ("plain", "output", "captured callback"):
        assert [output["ename"] for output in failed["cells"][2]["outputs"] if "ename" in output] == [
            "ZeroDivisionError"
        ]


def test_a_reply_that_comes_while_an_output_widget_is_told_of_is_not_missed(tmp_path):
    """Without the look every second, neither this notebook nor one of 400 such cells came to its end."""
    cells = ["from ipywidgets import Output", *["with Output():\n    print(1)"] * 30]
    folder = write_notebook(tmp_path / "n", "01_x", *cells, parameters="A = 1")
    code = (
        "import sys\nfrom pathlib import Path\nfrom mini_symposium.reproduce.notebooks import reproduce\n"
        "reproduce('tiny', Path(sys.argv[2]), notebooks_dir=Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, folder, tmp_path / "run"], check=True, timeout=180)


def test_bad_input_found_in_a_cell_stays_bad_input_and_a_repaired_notebook_leaves_no_trace(tmp_path):
    cell = "from mini_symposium.errors import InputError\nraise InputError('data/mine.md:41: too long; cut it')"
    folder = write_notebook(tmp_path / "n", "01_x", cell)
    with pytest.raises(InputError, match=r"^data/mine\.md:41: too long; cut it \(01_x, cell 3/3 `from"):
        run_it(folder, tmp_path / "run")
    write_notebook(folder, "01_x", "print('good')")
    assert statuses(run_it(folder, tmp_path / "run")) == ["01 run"]
    assert [path.name for path in (tmp_path / "run" / "notebooks").iterdir()] == ["01_x.ipynb"]


def test_view_names_the_cells_and_the_kernels_own_noise_stays_out_of_it(tmp_path, capfd):
    noise = "import os, sys\nos.write(1, b'NOISE')\nos.write(2, b'NOISE')\nos.system('echo NOISE >&2')\nprint('NOISE')"
    folder = write_notebook(tmp_path / "n", "01_x", "# Look at [bold]the data\n1 + 1", noise)
    shown = io.StringIO()
    summary = run_it(folder, tmp_path / "run", console=Console(file=shown, width=40))
    assert "01_x 3/4 Look at [bold]the data\n" in shown.getvalue()
    live = io.StringIO()
    run_it(folder, tmp_path / "live", console=Console(file=live, width=120, force_terminal=True))
    assert "Look at [bold]the data" in live.getvalue()
    assert "4/4 done" in live.getvalue()
    printed = capfd.readouterr()
    assert "NOISE" not in shown.getvalue() + live.getvalue() + printed.out + printed.err

    summary["results"] = {"01_x": {"loss": {"1e-05": 0.12345678}, "rows": [{}] * 7}}
    tables = io.StringIO()
    print_summary(summary, Console(file=tables, width=200))
    assert "loss.1e-05" in tables.getvalue()
    assert "0.1235" in tables.getvalue()
    assert "nothing to do" not in tables.getvalue()
    tables = io.StringIO()
    print_summary(run_it(folder, tmp_path / "run"), Console(file=tables, width=200))
    assert "nothing to do" in tables.getvalue()


def test_relative_paths_mean_what_they_mean_to_the_caller(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.md").write_text("### New Query\nWhy?\n\n### Answer\nBecause.\n")
    cell = (
        f"from pathlib import Path\n{RECORD}\nRunDirectory(RUN).record('01_x', {{'read': Path(DATASET).read_text()}})"
    )
    folder = write_notebook(tmp_path / "n", "01_x", cell)
    summary = run_it(folder, "here", parameters={"DATASET": "mine.md"})
    assert summary["results"]["01_x"]["read"] == Path("mine.md").read_text()
    assert (tmp_path / "here" / "results.json").is_file()


def test_a_second_process_on_the_same_run_is_refused(folder, tmp_path):
    code = (
        "import fcntl, pathlib, sys\nrun = pathlib.Path(sys.argv[1]); run.mkdir()\nlock = open(run / '.lock', 'a')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    )
    holder = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="run: another process works here"):
            run_it(folder, tmp_path / "run")
        process.stdin.close()
    assert statuses(run_it(folder, tmp_path / "run", only=["01"])) == ["01 run"]


ATTEMPT = """
import signal, sys
from pathlib import Path
from mini_symposium.cli import main as cli
from mini_symposium.reproduce.notebooks import reproduce
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell
cli.app.command("x")(lambda: reproduce("tiny", sys.argv[2], notebooks_dir=Path(sys.argv[1])) and None)
cli.main(["x"])
"""
SLOW = """# Slowly
import os, pathlib, time
marks = pathlib.Path(RUN) / "marks"
marks.mkdir(exist_ok=True)
(marks / f"{{os.getpid()}}.{name}").write_text("")
for _ in range({tenths}):
    time.sleep(0.1)"""


def wait_for(look, process=None, seconds: float = 60):
    """What `look` finds, once it finds something."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and (process is None or process.poll() is None):
        if found := look():
            return found
        time.sleep(0.02)
    raise AssertionError("it never came")


def test_killed_or_interrupted_in_and_between_notebooks_it_goes_on_and_ends_the_same(tmp_path):
    for name, result in (("01_a", "{'n': 1}"), ("02_b", "{'n': 1 + RunDirectory(RUN).results()['01_a']['n']}")):
        last = f"{RECORD}\nRunDirectory(RUN).record('{name}', {result})"
        write_notebook(tmp_path / "n", name, SLOW.format(name=name, tenths=8), last, parameters='RUN = ""')
    run, whole = tmp_path / "run", tmp_path / "whole"
    copies, marks = run / "notebooks", run / "marks"

    def started(name: str) -> list[int]:
        return [int(mark.stem) for mark in marks.glob(f"*.{name}")]

    def attempt(look, sign: int) -> tuple[int, str]:
        arguments = [sys.executable, "-c", ATTEMPT, tmp_path / "n", run]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for(look, process)
        process.send_signal(sign)
        _, said = process.communicate(timeout=60)
        for kernel in started("01_a") + started("02_b"):  # none is left behind
            wait_for(lambda kernel=kernel: not Path(f"/proc/{kernel}").exists(), seconds=20)
        return process.returncode, said

    assert attempt(lambda: len(started("01_a")) == 1, signal.SIGKILL)[0] == -signal.SIGKILL
    code, said = attempt(lambda: len(started("01_a")) == 2, signal.SIGINT)
    assert code == 130
    assert "the same command goes on from there" in said and "Traceback" not in said
    attempt((copies / "01_a.ipynb").exists, signal.SIGKILL)
    first = (copies / "01_a.ipynb").read_bytes()
    attempt(lambda: started("02_b"), signal.SIGKILL)
    (run / ".results.json.abc.part").mkdir()
    summary = run_it(tmp_path / "n", run)
    assert statuses(summary) == ["01 already there", "02 run"]
    assert (copies / "01_a.ipynb").read_bytes() == first
    assert summary["results"] == run_it(tmp_path / "n", whole)["results"] == {"01_a": {"n": 1}, "02_b": {"n": 2}}
    assert sorted(path.name for path in copies.iterdir()) == ["01_a.ipynb", "02_b.ipynb"]
    assert {path.name for path in run.iterdir()} == {".lock", "marks", "notebooks", "results.json"}


def test_a_clock_that_is_set_back_makes_nothing_old(folder, tmp_path):
    """What a copy says of its time is as if the second notebook had been run a year before the first."""
    run_it(folder, tmp_path / "run")
    copy = tmp_path / "run" / "notebooks" / "02_b.ipynb"
    notebook = json.loads(copy.read_text())
    for key in ("start_time", "end_time"):
        notebook["metadata"]["papermill"][key] = "2001" + notebook["metadata"]["papermill"][key][4:]
    copy.write_text(json.dumps(notebook))
    assert statuses(run_it(folder, tmp_path / "run")) == ["01 already there", "02 already there"]


def test_what_a_notebook_prints_of_the_environments_secrets_does_not_stay_in_its_copy(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    cell = "import os\nprint(os.environ['HF_TOKEN'])\nprint({**os.environ})\nos.environ['HF_TOKEN']"
    folder = write_notebook(tmp_path / "n", "01_x", cell, "1 / len('') if os.environ['HF_TOKEN'] else 0")
    with pytest.raises(NotebookError, match="ZeroDivisionError"):
        run_it(folder, tmp_path / "run")
    [copy] = (tmp_path / "run" / "notebooks").iterdir()
    assert "***" in copy.read_text()
    write_notebook(folder, "01_x", cell, "raise ValueError(os.environ['HF_TOKEN'])")
    with pytest.raises(NotebookError, match=r"ValueError: \*\*\*"):
        run_it(folder, tmp_path / "run")
    assert not any(b"hf_abc" in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
