"""Execute the notebooks in order through papermill, and fail if anything in them failed.

The rules:

- what is wrong with the input is said before a kernel starts (to papermill, an unknown parameter is a warning);
- an executed copy carries what it was made from;
- as in make, a copy is up to date if it was made from the same and nothing before it is newer; copies are numbered as
  they are made, for a clock may be set back.
"""

import ast
import difflib
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mini_symposium.data.dataset import fingerprint, load_examples
from mini_symposium.errors import InputError
from mini_symposium.files.reading import parse_json, read_text
from mini_symposium.files.writing import alone, clear_away, write_json
from mini_symposium.recipe import KEYS, load_recipe
from mini_symposium.reproduce.kernel import Notebook, execute, view
from mini_symposium.run import ROOT, RunDirectory, said_already

NOTEBOOKS = ROOT / "notebooks"

OVERWRITING = "overwriting_notebooks.json"
"""In a run directory: what is being executed in place of what was there before."""
OF_THE_RUN = {"RECIPE", "DATASET", "RUN", "OVERWRITE"}
"""Parameters that hold for a run as a whole; a copy is compared with what they stand for, not with their values."""


def read_notebooks(folder: Path) -> list[Notebook]:
    """The notebooks NN_name.ipynb of a folder, in order."""
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise InputError(f"{folder}: no notebooks NN_name.ipynb in it")
    return [_read_notebook(path) for path in paths]


def _read_notebook(path: Path) -> Notebook:
    try:
        cells = parse_json(read_text(path), path)["cells"]
        sources = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
        tagged = [i for i, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", [])]
        lines = ast.parse(sources[tagged[0]][1]).body if tagged else []
        parameters = {line.targets[0].id: ast.literal_eval(line.value) for line in lines}
    except (ValueError, LookupError, TypeError, AttributeError, SyntaxError, MemoryError, RecursionError) as error:
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
    with alone(directory.path):
        clear_away(directory.path)
        for killed in directory.notebooks.glob("*.running.ipynb"):
            killed.unlink()
        if overwrite:
            # Once: cut off and started again, the same command goes on with what it has made since.
            begun = {**given, **content, "notebooks": [notebook.name for notebook in wanted]}
            if not said_already(directory.path / OVERWRITING, begun):
                for notebook in wanted:
                    (directory.notebooks / notebook.path.name).unlink(missing_ok=True)
                write_json(directory.path / OVERWRITING, begun)
        due = _due(notebooks, wanted, given, content, directory, overwrite)
        with view(console or Console()) as show:
            for notebook, made in due:
                execute(notebook, made, given, directory, show)
        (directory.path / OVERWRITING).unlink(missing_ok=True)
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


def _copy(directory: RunDirectory, notebook: Notebook) -> dict | None:
    """Metadata of the finished copy, if there is one."""
    path = directory.notebooks / notebook.path.name
    if not path.exists():
        return None
    try:
        metadata = parse_json(read_text(path), path)["metadata"]
        made, papermill = metadata["mini_symposium"], metadata["papermill"]
        whole = {"source", "parameters", "recipe", "dataset"} <= made.keys() and {"duration"} <= papermill.keys()
        if not whole:
            raise KeyError("mini_symposium")
        return {"made": made, "papermill": papermill}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a finished copy; move it away, or choose another --run") from error


def _due(notebooks, wanted, given, content, directory, overwrite) -> list[tuple[Notebook, dict]]:
    """The notebooks to execute, each with what it is made from.

    Raises
    ------
    InputError
        If a copy was made from something else, and nothing is to be overwritten.
    """
    due, newest, serial = [], 0, 0
    for notebook in notebooks:
        parameters = {k: given.get(k, v) for k, v in notebook.parameters.items() if k not in OF_THE_RUN}
        made = json.loads(json.dumps({"source": notebook.source, "parameters": parameters, **content}))
        copy = _copy(directory, notebook)
        if copy and not overwrite:
            _refuse_another(directory.path, copy["made"], made, notebook in wanted)
        number = copy["made"].get("serial", 0) if copy else 0
        serial = max(serial, number)
        fresh = copy and copy["made"]["source"] == notebook.source and number >= newest
        if notebook in wanted and not fresh:
            due.append((notebook, made))
            newest = math.inf
        else:
            newest = max(newest, number)
    return [(notebook, {**made, "serial": serial + n}) for n, (notebook, made) in enumerate(due, start=1)]


def _refuse_another(run: Path, old: dict, new: dict, with_parameters: bool) -> None:
    pairs = [(old["recipe"], new["recipe"])] + [(old["parameters"], new["parameters"])] * with_parameters
    differing = [f"{k}={a[k]}, now {b[k]}" for a, b in pairs for k in a if k in b and a[k] != b[k]]
    differing += ["another dataset"] * (old["dataset"] != new["dataset"])
    if differing:
        raise InputError(f"{run}: was made with {'; '.join(differing)}; pass --overwrite, or choose another --run")


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
