"""Execute the notebooks in order, and fail if anything in them failed.

The rules:

- bad input is reported before a kernel starts (to papermill, an unknown parameter is only a warning);
- an executed copy records what it was made from;
- as with make, a copy is up to date if it was made from the same sources and no earlier notebook's copy is newer.
  Copies are numbered as they are made, because a clock may be set back.
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

from mini_symposium.data.dataset import fingerprint, recipe_examples
from mini_symposium.errors import InputError
from mini_symposium.files.reading import parse_json, read_text, refuse_other_shapes
from mini_symposium.files.writing import alone, clear_away
from mini_symposium.recipe import KEYS, load_recipe
from mini_symposium.reproduce.kernel import Notebook, execute, view
from mini_symposium.run import ROOT, RunDirectory, overwrite_once

NOTEBOOKS = ROOT / "notebooks"

OVERWRITING = "overwriting_notebooks.json"
"""A run's file that names what an unfinished --overwrite command was asked to do."""
OF_THE_RUN = {"RECIPE", "DATASET", "RUN", "OVERWRITE"}
"""Parameters of the whole run. Copies are compared by the content of recipe and dataset, not by these values."""


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
    """Read `NAME=VALUE` pairs; a value that is not a Python literal is text.

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
    """Check that the executed notebooks (`names`, or all) have parameters of these names and types.

    Returns `given` as JSON would hold it. The InputError for an unknown parameter suggests similar names.
    """
    defaults = {}
    for notebook in read_notebooks(Path(notebooks_dir)):
        executed = not names or notebook.name in names
        defaults |= {name: value for name, value in notebook.parameters.items() if executed or name in OF_THE_RUN}
    checked = {}
    for name, value in given.items():
        if name not in defaults:
            similar = difflib.get_close_matches(name.upper(), defaults, 3, 0.5) or sorted(defaults)
            searched = ", ".join(names) or "the notebooks"
            raise InputError(f"-p {name}: no such parameter in {searched}; there is {', '.join(similar)}")
        kind = type(defaults[name])
        fits = kind is type(None) or type(value) is kind or (kind, type(value)) in ((float, int), (list, tuple))
        if not fits:
            remedy = f"; write -p '{name}=\"{value}\"'" if kind is str else ""
            article = "an" if kind is int else "a"
            raise InputError(f"-p {name}: {name} takes {article} {kind.__name__}; found {value!r}{remedy}")
        try:
            checked[name] = json.loads(json.dumps(value))
        except TypeError as error:
            raise InputError(f"-p {name}: found {value!r}; a parameter consists of numbers, texts and lists") from error
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
    """Execute the notebooks that are not up to date, in order, into `run`/notebooks.

    RECIPE, RUN (absolute), OVERWRITE and `parameters` are set in every notebook that has them. Kernels start in the
    caller's working directory, so a relative path in a parameter is relative to that directory.

    Parameters
    ----------
    run
        Run directory; runs/<recipe's name> if None.
    only
        Numbers of notebooks, such as "02"; all of them if None.

    Returns
    -------
    dict
        `run`, `results` (what results.json holds), and `notebooks`: for each {name, status: "run" or "already there",
        seconds, path}.

    Raises
    ------
    InputError
        Before a kernel starts, if the input is bad, or the run is in use or was made from other inputs;
        later, if a cell raised one.
    NotebookError
        If a cell raised anything else, or the kernel died.
    """
    notebooks = read_notebooks(Path(notebooks_dir))
    unknown = set(only or []) - {notebook.name[:2] for notebook in notebooks}
    if unknown:
        numbers = ", ".join(notebook.name[:2] for notebook in notebooks)
        raise InputError(f"--only {', '.join(sorted(unknown))}: no such notebook; there is {numbers}")
    wanted = [notebook for notebook in notebooks if not only or notebook.name[:2] in only]
    given = check_parameters(parameters or {}, *(n.name for n in wanted), notebooks_dir=notebooks_dir)
    recipe = given.pop("RECIPE", None) or recipe
    chosen = load_recipe(recipe)
    changes = {name.lower(): value for name, value in given.items() if name.lower() in KEYS and value}
    if given.get("DATASET"):
        changes["datasets"] = [{"path": given["DATASET"], "type": "completion"}]
    content = {
        "recipe": {key: getattr(chosen, key) for key in KEYS if key not in ("datasets", "output_dir")},
        "dataset": fingerprint(recipe_examples(chosen.replace(**changes))[0]),
    }
    directory = RunDirectory(given.pop("RUN", None) or run or f"runs/{chosen.name}")
    given |= {"RECIPE": str(recipe), "RUN": str(directory.path.absolute()), "OVERWRITE": overwrite}
    with alone(directory.path):
        clear_away(directory.path)
        for killed in directory.notebooks.glob("*.running.ipynb"):
            killed.unlink()
        if overwrite:
            begun = {**given, **content, "notebooks": [notebook.name for notebook in wanted]}

            def forget() -> None:
                for notebook in wanted:
                    (directory.notebooks / notebook.path.name).unlink(missing_ok=True)

            overwrite_once(directory.path / OVERWRITING, begun, forget)
        due = _due(notebooks, wanted, given, content, directory, overwrite)
        with view(console or Console()) as show:
            for notebook, made_from in due:
                execute(notebook, made_from, given, directory, show)
        (directory.path / OVERWRITING).unlink(missing_ok=True)
        entries = [
            {
                "name": notebook.name,
                "status": "run" if any(notebook is other for other, _ in due) else "already there",
                "seconds": _read_copy(directory, notebook)[1],
                "path": str(directory.notebooks / notebook.path.name),
            }
            for notebook in wanted
        ]
    return {"run": str(directory.path), "notebooks": entries, "results": directory.results()}


def _read_copy(directory: RunDirectory, notebook: Notebook) -> tuple[dict, float] | None:
    """What the finished copy was made from, and the seconds it took; None if there is no copy."""
    path = directory.notebooks / notebook.path.name
    if not path.exists():
        return None
    with refuse_other_shapes(f"{path}: not a finished copy", "move it away, or choose another --run"):
        metadata = parse_json(read_text(path), path)["metadata"]
        return metadata["mini_symposium"], round(metadata["papermill"]["duration"], 1)


def _due(notebooks, wanted, given, content, directory, overwrite) -> list[tuple[Notebook, dict]]:
    """The notebooks to execute, each with the inputs that its copy records (`made_from`)."""
    due, newest, serial = [], 0, 0
    for notebook in notebooks:
        parameters = {k: given.get(k, v) for k, v in notebook.parameters.items() if k not in OF_THE_RUN}
        made_from = json.loads(json.dumps({"source": notebook.source, "parameters": parameters, **content}))
        old, _ = _read_copy(directory, notebook) or ({}, 0)
        if old and not overwrite:
            _refuse_other_inputs(directory.path, old, made_from, notebook in wanted)
        number = old.get("serial", 0)
        serial = max(serial, number)
        up_to_date = old and old["source"] == notebook.source and number >= newest
        if notebook in wanted and not up_to_date:
            due.append((notebook, made_from))
            newest = math.inf
        else:
            newest = max(newest, number)
    return [(notebook, {**made_from, "serial": serial + n}) for n, (notebook, made_from) in enumerate(due, start=1)]


def _refuse_other_inputs(run: Path, old: dict, new: dict, with_parameters: bool) -> None:
    """Raise an InputError if a copy was made with another recipe, dataset, or (`with_parameters`) other parameters."""
    pairs = [(old["recipe"], new["recipe"])] + [(old["parameters"], new["parameters"])] * with_parameters
    differing = [f"{k}={a[k]}, now {b[k]}" for a, b in pairs for k in a if k in b and a[k] != b[k]]
    differing += ["another dataset"] * (old["dataset"] != new["dataset"])
    if differing:
        raise InputError(f"{run}: was made with {'; '.join(differing)}; pass --overwrite, or choose another --run")


def print_summary(summary: dict, console: Console) -> None:
    """Print which notebooks ran, what they recorded, and where their files are."""
    run = summary["run"]
    if all(notebook["status"] == "already there" for notebook in summary["notebooks"]):
        console.print(f"nothing to do: the notebooks of {run} are there and up to date", markup=False, soft_wrap=True)
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
    for what, name in (("results", "results.json"), ("executed copies", "notebooks"), ("figures", "figures")):
        if (Path(run) / name).exists():
            console.print(f"{what}: {Path(run) / name}", markup=False, highlight=False, soft_wrap=True)


def _flat(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """The scalars in `value`, each with its path; for a long list, or a list of objects, only the number of entries.

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
