"""What of a run is committed: notebooks with their outputs, cleaned, and the numbers that its figures are drawn from.

A committed output must be the same after the next run on the same machine, and show on GitHub: so no execution
counts, no progress bars, no widget state, nothing of the machine's paths, and no injected parameters.
"""

import re
import shutil
from pathlib import Path

import nbformat

from mini_symposium.errors import InputError
from mini_symposium.files.writing import written_whole
from mini_symposium.run import ROOT, RunDirectory

WIDGET = "application/vnd.jupyter.widget-view+json"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
ABSOLUTE_PATH = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users|usr|var)/\S+")


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as it may be committed.

    Raises
    ------
    InputError
        If an output names a path of this machine.
    """
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        tags = [tag for tag in cell.metadata.get("tags", []) if tag == "parameters"]
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs if _stays(output)]
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = None
                found = ABSOLUTE_PATH.search(output.get("text", "") + output.get("data", {}).get("text/plain", ""))
                if found:
                    raise InputError(f"an output names {found.group()}; print paths relative to the run")
    return notebook


def _stays(output: nbformat.NotebookNode) -> bool:
    return output.get("name") != "stderr" and WIDGET not in output.get("data", {})


def publish(run: RunDirectory, root: Path = ROOT) -> list[Path]:
    """Write notebooks/*.ipynb and figures/NAME/ from a run; return what was written."""
    executed = sorted(run.notebooks.glob("[0-9][0-9]_*.ipynb"))
    if not executed:
        raise InputError(f"{run.notebooks}: no executed notebooks; run `mini-symposium reproduce` first")
    written = []
    for path in executed:
        try:
            notebook = clean(nbformat.read(path, as_version=4))
        except (nbformat.ValidationError, nbformat.reader.NotJSONError, AttributeError, KeyError) as error:
            said = str(error).splitlines()[0]
            raise InputError(f"{path}: no notebook ({said}); run `mini-symposium reproduce` again") from error
        with written_whole(root / "notebooks" / path.name) as temporary:
            nbformat.write(notebook, temporary)
        written.append(root / "notebooks" / path.name)
    target = root / "figures" / run.path.name
    kept = [run.recipe_file, *(run.path / name for name in ("environment.json", "results.json"))]
    kept += [path for name in ("base.json", "claims.json") if (path := run.path / name).exists()]
    kept += [*run.path.glob("lr-*/*.jsonl"), *run.path.glob("lr-*/evaluations/*.json"), *run.figures.iterdir()]
    for path in sorted(kept):
        copy = target / path.relative_to(run.path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(copy) as temporary:
            shutil.copyfile(path, temporary)
        written.append(copy)
    return written
