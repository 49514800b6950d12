"""What a notebook needs that was opened alone on Colab or Binder: the kit's requirements, and a run to read.

Colab's kernel, its tables and its CUDA driver need the versions that Colab brings; with others its sessions crash. So
those are kept, and everything else is installed as pinned. Binder builds its image from requirements.txt and
pyproject.toml, and has all. Anywhere else nothing is installed.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

COLAB, BINDER = "COLAB_RELEASE_TAG", "BINDER_REPO_URL"
"""Variables of the environment by which the two are known."""
KEPT = {"torch", "numpy", "pandas"}
"""What Colab keeps, beside all that its kernel has imported before the notebook's first cell."""
NOT_NEEDED = {"jupyterlab", "voila", "papermill", "nbclient"}
"""Front ends, and what executes notebooks without one."""

READING = ("03_loss_curves", "06_claims", "08_examples")
"""Notebooks that only read a run: the committed one's numbers are enough."""
LOADING = ("04_merge", "05_prompt_formats", "07_playground")
"""Notebooks that load a run's adapters, which are not committed."""
RUN = "runs/proxy"


def make_ready(notebook: str) -> None:
    """Bring what a notebook such as "03_loss_curves" needs on Colab or Binder; elsewhere say that it needs nothing."""
    hosted = {COLAB, BINDER} & os.environ.keys() and "MINI_SYMPOSIUM_HEADLESS" not in os.environ
    if not hosted:
        if not any(name.startswith("VOILA_") for name in os.environ):  # there it would stand on the page
            print("Not on Colab or Binder: nothing to install.")
        return
    if COLAB in os.environ:
        kept = loaded() | KEPT
        install(missing(kept | NOT_NEEDED), kept)
        print("installed; torch, numpy, pandas and what the kernel runs on are Colab's own versions")
    if notebook in (*READING, *LOADING):
        _bring_run(notebook)


def _name(distribution: str) -> str:
    """A distribution's name as the Python registry compares names."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def loaded() -> set[str]:
    """The distributions of which this process has imported something."""
    owners = metadata.packages_distributions()
    modules = {name.partition(".")[0] for name in sys.modules}
    return {_name(owner) for module in modules for owner in owners.get(module, ())}


def missing(without: set[str]) -> list[str]:
    """The kit's pinned requirements that are not installed in that version, those in `without` left out."""
    found = []
    for requirement in metadata.requires("mini-symposium") or ():
        name, _, pinned = requirement.partition("==")
        if ";" in requirement or _name(name) in without:  # after the semicolon stands the extra that wants it
            continue
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed = ""
        if installed.partition("+")[0] != pinned:
            found.append(requirement)
    return found


def install(requirements: list[str], kept: set[str]) -> None:
    """Install `requirements` with pip; the distributions in `kept` stay as they are, or pip fails."""
    if not requirements:
        return
    versions = {_name(each.name): each.version for each in metadata.distributions() if each.name}
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "kept.txt"
        constraints.write_text("".join(f"{name}=={versions[name]}\n" for name in sorted(kept & versions.keys())))
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", constraints]
        subprocess.run([*pip, *requirements], check=True)


def _bring_run(notebook: str) -> None:
    """Make the run that the notebook's parameter RUN names."""
    from mini_symposium.run import ROOT, RunDirectory

    run = RunDirectory(RUN)
    if any(run.path.glob("lr-*/checkpoints/*")) or (notebook in READING and run.recipe_file.exists()):
        return
    if notebook in READING:

        def copy_new(file: str, copy: str) -> None:
            if not Path(copy).exists():  # notebook 01 may have left its results
                shutil.copyfile(file, copy)

        shutil.copytree(ROOT / "figures" / "proxy", run.path, copy_function=copy_new, dirs_exist_ok=True)
        print(f"{RUN}: the committed run's numbers; for your own, run notebook 02 on this machine first")
    elif COLAB in os.environ:
        print(f"{RUN}: training what this notebook reads, as notebook 02 does; about ten minutes", flush=True)
        train = ["mini_symposium", "train", "--run", str(run.path), "-p", "FOLDS=4"]
        subprocess.run([sys.executable, "-m", *train], check=True)
    else:
        print(f"{RUN} is not here, and 2 GB of memory, Binder's, are too little to train it.")
        print('Run notebook 02 with RECIPE = "tiny" first, and set RUN = "runs/tiny" below.')
