"""Copy the files of a run that are committed: notebooks with cleaned outputs, figures, and the numbers behind them.

A committed output must be shown by GitHub, and stay the same after another run on the same machine. So it has no
progress bars, widget state, paths of this machine, or injected parameters, and its cells are counted from 1.
"""

import re
import shutil
from pathlib import Path

import nbformat

from mini_symposium.errors import InputError, reason
from mini_symposium.files.writing import written_whole
from mini_symposium.run import ROOT, RunDirectory

WIDGET = "application/vnd.jupyter.widget-view+json"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
ABSOLUTE_PATH = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users|usr|var)/\S+")


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Remove in place what is not committed, and count the cells that are left."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    number = 0
    for cell in notebook.cells:
        tags = [tag for tag in cell.metadata.get("tags", []) if tag == "parameters"]
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.execution_count = number = number + 1
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr" and WIDGET not in output.get("data", {})
            ]
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = number
                text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
                if path := ABSOLUTE_PATH.search(text):
                    raise InputError(f"an output names {path.group()}; print paths relative to the run")
    return notebook


def publish(run: RunDirectory, root: Path = ROOT) -> list[Path]:
    """Write notebooks/*.ipynb and figures/NAME/ below `root` from a run; return the files written.

    Raises
    ------
    InputError
        If nothing was executed in the run, a copy is not a notebook, or an output names a path of this machine.
    """
    executed = sorted(run.notebooks.glob("[0-9][0-9]_*.ipynb"))
    if not executed:
        raise InputError(f"{run.notebooks}: no executed notebooks; run `mini-symposium reproduce` first")
    written = []
    for path in executed:
        try:
            notebook = clean(nbformat.read(path, as_version=4))
        except (nbformat.ValidationError, nbformat.reader.NotJSONError, AttributeError, KeyError) as error:
            raise InputError(
                f"{path}: not a notebook ({reason(error)}); run `mini-symposium reproduce` again"
            ) from error
        with written_whole(root / "notebooks" / path.name) as temporary:
            nbformat.write(notebook, temporary)
        written.append(root / "notebooks" / path.name)
    target = root / "figures" / run.path.name
    files = [run.recipe_file, *(run.path / name for name in ("environment.json", "results.json"))]
    files += [path for name in ("base.json", "claims.json", "curve.json") if (path := run.path / name).exists()]
    files += [*run.path.glob("lr-*/*.jsonl"), *run.path.glob("lr-*/evaluations/*.json"), *run.figures.iterdir()]
    for path in sorted(files):
        copy = target / path.relative_to(run.path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(copy) as temporary:
            shutil.copyfile(path, temporary)
        written.append(copy)
    return written
