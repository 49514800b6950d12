"""Execute the notebooks in order through papermill, and fail if anything in them failed.

papermill lets more pass than one expects: an unknown parameter is a warning, `with Output():` swallows an
exception, a widget callback's exception is only displayed, `sys.exit(0)` skips the rest. The rules here:

- what is wrong with the input is said before a kernel starts;
- any error that a kernel reports ends the run at that cell, whoever caught it on the way;
- an executed copy gets its name only once it finished, and carries what it was made from;
- as in make, a copy is up to date if it was made from the same and nothing before it is newer.
"""

import ast
import difflib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from mini_symposium import InputError, RunError
from mini_symposium.dataset import fingerprint, load_examples
from mini_symposium.recipe import KEYS, load_recipe
from mini_symposium.run_directory import ROOT, RunDirectory, written_whole

NOTEBOOKS = ROOT / "notebooks"

OF_THE_RUN = {"RECIPE", "DATASET", "RUN", "OVERWRITE"}
"""Parameters that hold for a run as a whole; a copy is compared with what they stand for, not with their values."""


class NotebookError(RunError):
    """A cell raised, wherever the exception was caught, or its kernel died."""


@dataclass(frozen=True)
class Notebook:
    """What is known of a notebook without executing it."""

    path: Path
    parameters: dict
    """Name -> default, from the cell tagged `parameters`."""
    source: str
    """sha256 of its cells."""

    @property
    def name(self) -> str:
        return self.path.stem


def read_notebooks(folder: Path) -> list[Notebook]:
    """The notebooks NN_name.ipynb of a folder, in order."""
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise InputError(f"{folder}: no notebooks NN_name.ipynb in it")
    return [_read_notebook(path) for path in paths]


def _read_notebook(path: Path) -> Notebook:
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
        tagged = [i for i, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", [])]
        lines = ast.parse(sources[tagged[0]][1]).body if tagged else []
        parameters = {line.targets[0].id: ast.literal_eval(line.value) for line in lines}
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        raise InputError(f"{path}: not a notebook whose parameters are literals ({error!r})") from error
    return Notebook(path, parameters, hashlib.sha256(json.dumps(sources).encode()).hexdigest())


def parse_parameters(pairs: list[str]) -> dict[str, object]:
    """Read `NAME=VALUE`: the value as a Python literal if it is one, else as text.

    >>> parse_parameters(["NUM_EPOCHS=3", "LEARNING_RATES=[1e-3]", "DATASET=mine.md"])
    {'NUM_EPOCHS': 3, 'LEARNING_RATES': [0.001], 'DATASET': 'mine.md'}
    """
    parameters = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise InputError(f"-p {pair}: takes NAME=VALUE")
        try:
            parameters[name.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            parameters[name.strip()] = value
    return parameters


def check_parameters(given: dict[str, object], *names: str, notebooks_dir: Path = NOTEBOOKS) -> dict[str, object]:
    """`given`, if the notebooks of these names (any name, if none is given) have such parameters of such types.

    Raises
    ------
    InputError
        Naming the parameter, and what it could have been.
    """
    defaults = {}
    for notebook in read_notebooks(Path(notebooks_dir)):
        here = not names or notebook.name in names
        defaults |= {name: value for name, value in notebook.parameters.items() if here or name in OF_THE_RUN}
    checked = {}
    for name, value in given.items():
        if name not in defaults:
            near = difflib.get_close_matches(name.upper(), defaults, 3, 0.5) or sorted(defaults) or ["none"]
            searched = ", ".join(names) or "the notebooks"
            raise InputError(f"-p {name}: no such parameter in {searched}; there is {', '.join(near)}")
        kind = type(defaults[name])
        fits = kind is type(None) or type(value) is kind or (kind, type(value)) in ((float, int), (list, tuple))
        if not fits:
            remedy = f"; write -p '{name}=\"{value}\"'" if kind is str else ""
            article = "an" if kind is int else "a"
            raise InputError(f"-p {name}: {name} takes {article} {kind.__name__}; found {value!r}{remedy}")
        try:
            checked[name] = json.loads(json.dumps(value))
        except TypeError as error:
            raise InputError(f"-p {name}: found {value!r}; a parameter is made of numbers, texts and lists") from error
    return checked


def reproduce(
    recipe: str = "proxy",
    run: str | Path | None = None,
    parameters: dict[str, object] | None = None,
    only: list[str] | None = None,
    overwrite: bool = False,
    notebooks_dir: Path = NOTEBOOKS,
    console: Console | None = None,
) -> dict:
    """Execute what is not up to date, in order, into `run`/notebooks.

    RECIPE, RUN (absolute) and OVERWRITE are set in every notebook that has them. Kernels start in the caller's
    working directory, so that a relative path in a parameter means what it means to the caller.

    Parameters
    ----------
    run
        Run directory; runs/<recipe's name> if None.
    parameters
        As `parse_parameters` gives them; each goes to the notebooks that have it.
    only
        Numbers of notebooks ("02"); all of them if None.

    Returns
    -------
    dict
        `run`, `results` (results.json), and `notebooks`: {name, status: "run" or "already there", seconds, path} each.

    Raises
    ------
    InputError
        Before a kernel starts, if the input is bad, or the run is in use or was made from something else;
        later, if a cell raised one.
    NotebookError
        If a cell raised anything else, or the kernel died.
    """
    notebooks = read_notebooks(Path(notebooks_dir))
    unknown = set(only or []) - {notebook.name[:2] for notebook in notebooks}
    if unknown:
        there = ", ".join(notebook.name[:2] for notebook in notebooks)
        raise InputError(f"--only {', '.join(sorted(unknown))}: no such notebook; there is {there}")
    wanted = [notebook for notebook in notebooks if not only or notebook.name[:2] in only]
    given = check_parameters(parameters or {}, *(n.name for n in wanted), notebooks_dir=notebooks_dir)
    recipe = given.pop("RECIPE", None) or recipe
    chosen = load_recipe(recipe)
    changes = {name.lower(): value for name, value in given.items() if name.lower() in KEYS and value}
    if given.get("DATASET"):
        changes["datasets"] = [{"path": given["DATASET"], "type": "completion"}]
    content = {
        "recipe": {key: getattr(chosen, key) for key in KEYS if key not in ("datasets", "output_dir")},
        "dataset": fingerprint(load_examples(chosen.replace(**changes).dataset)),
    }
    directory = RunDirectory(given.pop("RUN", None) or run or f"runs/{chosen.name}")
    given |= {"RECIPE": str(recipe), "RUN": str(directory.path.absolute()), "OVERWRITE": overwrite}
    with _alone(directory.path):
        due = _due(notebooks, wanted, given, content, directory, overwrite)
        with _view(console or Console()) as show:
            for notebook, made in due:
                _execute(notebook, made, given, directory, show)
        entries = [
            {
                "name": notebook.name,
                "status": "run" if any(notebook is other for other, _ in due) else "already there",
                "seconds": round(_copy(directory, notebook)["papermill"]["duration"], 1),
                "path": str(directory.notebooks / notebook.path.name),
            }
            for notebook in wanted
        ]
    return {"run": str(directory.path), "notebooks": entries, "results": directory.results()}


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    """Hold the run directory; a second process is refused. The lock ends with the process, however that ends."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / ".lock").open("a")
    except OSError as error:
        raise InputError(f"{run}: cannot be written ({error.strerror}); choose another --run") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{run}: another process works here; wait for it, or choose another --run") from None
        yield


def _copy(directory: RunDirectory, notebook: Notebook) -> dict | None:
    """Metadata of the finished copy, if there is one."""
    path = directory.notebooks / notebook.path.name
    if not path.exists():
        return None
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
        return {"made": metadata["mini_symposium"], "papermill": metadata["papermill"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a finished copy; move it away, or choose another --run") from error


def _due(notebooks, wanted, given, content, directory, overwrite) -> list[tuple[Notebook, dict]]:
    """The notebooks to execute, each with what it is made from.

    Raises
    ------
    InputError
        If a copy was made from something else, and is not to be overwritten.
    """
    due, newest = [], ""
    for notebook in notebooks:
        parameters = {k: given.get(k, v) for k, v in notebook.parameters.items() if k not in OF_THE_RUN}
        made = json.loads(json.dumps({"source": notebook.source, "parameters": parameters, **content}))
        copy = _copy(directory, notebook)
        if copy and not overwrite:
            _refuse_another(directory.path, copy["made"], made, notebook in wanted)
        fresh = copy and copy["made"]["source"] == notebook.source and copy["papermill"]["start_time"] >= newest
        if notebook in wanted and (overwrite or not fresh):
            due.append((notebook, made))
            newest = "now"  # after every date
        elif copy:
            newest = max(newest, copy["papermill"]["end_time"])
    return due


def _refuse_another(run: Path, old: dict, new: dict, with_parameters: bool) -> None:
    pairs = [(old["recipe"], new["recipe"])] + [(old["parameters"], new["parameters"])] * with_parameters
    differing = [f"{k}={a[k]}, now {b[k]}" for a, b in pairs for k in a if k in b and a[k] != b[k]]
    differing += ["another dataset"] * (old["dataset"] != new["dataset"])
    if differing:
        raise InputError(f"{run}: was made with {'; '.join(differing)}; pass --overwrite, or choose another --run")


@contextmanager
def _view(console: Console) -> Iterator[Callable[[str, int, int, str], None]]:
    """Yield `show(notebook, cells done, of, caption)`: a live bar in a terminal, else a line for each new caption."""
    place = TextColumn("{task.fields[place]}", markup=False, table_column=Column(no_wrap=True, ratio=1))
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn(), place
    tasks, said = {}, set()
    with Progress(*columns, console=console, disable=not console.is_terminal, expand=True) as progress:

        def show(name: str, cells: int, of: int, caption: str) -> None:
            place = f"{min(cells + 1, of)}/{of} {caption}".rstrip()
            if name not in tasks:
                tasks[name] = progress.add_task(name, place=place)
            progress.update(tasks[name], completed=cells, total=of, place=place)
            if not console.is_terminal and (name, caption) not in said:
                said.add((name, caption))
                console.print(f"{name} {place}", markup=False, highlight=False, soft_wrap=True)

        yield show


def _execute(notebook: Notebook, made: dict, given: dict, directory: RunDirectory, show: Callable) -> None:
    """Run one notebook; its copy is named `.running` meanwhile, and `.failed` if it did not get to its end."""
    import nbformat
    from papermill import execute_notebook
    from papermill.engines import papermill_engines

    papermill_engines.register("mini-symposium", _engine())
    final = directory.notebooks / notebook.path.name
    running, failed = final.with_suffix(".running.ipynb"), final.with_suffix(".failed.ipynb")
    # papermill fills in {placeholders} in paths; ours are meant literally
    paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (notebook.path, running)]
    parameters = {name: given[name] for name in notebook.parameters if name in given}
    try:
        directory.notebooks.mkdir(parents=True, exist_ok=True)
        options = {"kernel_name": "python3", "language": "python", "progress_bar": False}
        done = execute_notebook(*paths, parameters, "mini-symposium", **options, notebook=notebook.name, show=show)
        done.metadata["mini_symposium"] = made
        done.metadata.papermill = {key: done.metadata.papermill[key] for key in ("start_time", "end_time", "duration")}
        with written_whole(final) as temporary:
            nbformat.write(done, temporary)
        running.unlink()
        failed.unlink(missing_ok=True)
        show(notebook.name, len(done.cells), len(done.cells), "done")
    except NotebookError as error:
        raise NotebookError(f"{error}; see {failed}") from error
    except OSError as error:
        if error.errno is None:
            raise
        raise InputError(f"{final}: cannot be written ({error.strerror}); free some space") from error
    finally:
        if running.exists():
            running.replace(failed)


def _engine() -> type:
    """papermill's engine with three differences: it says where it is, stops at any error, and runs this very Python."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from nbformat.v4 import output_from_msg
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import NBClientEngine

    class Client(PapermillNotebookClient):
        error, where, caption = None, "before its first cell", ""

        def create_kernel_manager(self):
            # With no directories to look in, `python3` is the running interpreter, whatever the machine has installed.
            # It is spoken to through sockets in a folder of its own: no open port, nothing left in the home directory.
            connection = {"transport": "ipc", "connection_file": str(Path(self.scratch) / "kernel.json")}
            own = KernelSpecManager(kernel_dirs=[])
            self.km = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=own, **connection)
            return self.km

        def starting(self, cell, cell_index):
            first, of = (cell.source.strip().splitlines() or [""])[0], len(self.nb.cells)
            if first.startswith("#"):
                self.caption = first.strip("# ")
            self.where = f"cell {cell_index + 1}/{of} `{first:.60}`"
            self.show(self.notebook, cell_index, of, self.caption)

        def process_message(self, msg, cell, cell_index):
            output = super().process_message(msg, cell, cell_index)
            if msg["msg_type"] == "error":
                self.error = self.error or msg["content"]
                if output is None:  # an Output widget took it; let it be seen in the copy as well
                    cell.outputs.append(output_from_msg(msg))
            return output

        def stop_at_error(self, cell, cell_index, execute_reply):
            reply = execute_reply["content"]
            if any(payload.get("source") == "ask_exit" for payload in reply.get("payload", [])):
                reply = {"status": "error", "ename": "SystemExit", "evalue": "the cell called exit()"}
            error = self.error or reply
            if error.get("ename") == "InputError":
                raise InputError(f"{error['evalue']} ({self.notebook}, {self.where})")
            if self.error or error["status"] != "ok":
                last = " ".join(f"{error.get('ename')}: {error.get('evalue')}".split())
                raise NotebookError(f"{self.notebook}, {self.where}: {last}")

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, notebook, show, **_):
            client = Client(
                nb_man, kernel_name=kernel_name, startup_timeout=180, iopub_timeout=60, coalesce_streams=True
            )
            client.notebook, client.show = notebook, show
            client.on_cell_start, client.on_cell_executed = client.starting, client.stop_at_error
            # What the kernel process itself prints must not run into the view; its last line may say why it died.
            with tempfile.TemporaryDirectory() as client.scratch, tempfile.TemporaryFile("w+") as log:
                try:
                    client.execute(env={**os.environ, "IPYTHONDIR": client.scratch}, stdout=log, stderr=log)
                except NotebookError:
                    raise
                except RuntimeError as error:  # it died, or never lived
                    log.seek(0)
                    said = [line.strip() for line in log if line.strip()] or ["perhaps memory ran out"]
                    raise NotebookError(f"{notebook}, {client.where}: {error} ({said[-1]})") from error

    return Engine


def print_summary(summary: dict, console: Console | None = None) -> None:
    """Show what ran, what the notebooks recorded, and where it lies."""
    console, run = console or Console(), summary["run"]
    if all(notebook["status"] == "already there" for notebook in summary["notebooks"]):
        console.print(
            f"nothing to do: the notebooks of {run} are there, made from the same", markup=False, soft_wrap=True
        )
    table = Table("notebook", "", "seconds")
    for notebook in summary["notebooks"]:
        table.add_row(notebook["name"], notebook["status"], f"{notebook['seconds']:.1f}")
    console.print(table)
    table = Table("notebook", "recorded", "value")
    for notebook, values in summary["results"].items():
        for name, value in _flat(values):
            table.add_row(notebook, escape(name), escape(value))
    if summary["results"]:
        console.print(table)
    for what, where in (("results", "results.json"), ("executed copies", "notebooks"), ("figures", "figures")):
        if (Path(run) / where).exists():
            console.print(f"{what}: {Path(run) / where}", markup=False, highlight=False, soft_wrap=True)


def _flat(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Scalars by their path; of a long list, or one of objects, only how many there are.

    >>> list(_flat({"loss": {"1e-05": 0.123456}, "rates": [1e-05, 1e-06], "rows": [{}]}))
    [('loss.1e-05', '0.1235'), ('rates', '1e-05, 1e-06'), ('rows', '1 entries')]
    """
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _flat(below, f"{name}.{key}" if name else str(key))
    elif not isinstance(value, list):
        yield name, f"{value:.4g}" if isinstance(value, float) else str(value)
    elif len(value) > 4 or any(isinstance(entry, (dict, list)) for entry in value):
        yield name, f"{len(value)} entries"
    else:
        yield name, ", ".join(text for entry in value for _, text in _flat(entry))
