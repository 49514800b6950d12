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

from mini_symposium.errors import InputError
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


def test_a_summary_shows_what_was_recorded_and_whether_there_was_anything_to_do(tmp_path):
    def printed(status: str) -> str:
        shown = io.StringIO()
        notebook = {"name": "01_x", "status": status, "seconds": 2.0, "path": ""}
        results = {"01_x": {"loss": {"1e-05": 0.12345678}, "rows": [{}] * 7}}
        summary = {"run": str(tmp_path), "notebooks": [notebook], "results": results}
        print_summary(summary, Console(file=shown, width=200))
        return shown.getvalue()

    assert all(part in printed("run") for part in ("loss.1e-05", "0.1235", "7 entries"))
    assert "nothing to do" not in printed("run")
    assert "nothing to do" in printed("already there")


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
    assert "the same command resumes from there" in said and "Traceback" not in said
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
