"""A notebook's first cell on a machine that has Python and nothing of the kit, as Colab's, without a network."""

import json
import os
import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import address
import nbformat
import pytest

from mini_symposium.reproduce import hosted
from mini_symposium.run import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SITE = sysconfig.get_path("purelib")


def sources(name: str) -> list[str]:
    """The sources of the code cells of a notebook."""
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


def distribution(folder: Path, name: str, version: str) -> None:
    """Install a distribution of one empty module into `folder`."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    (info / "RECORD").touch()
    (folder / f"{name}.py").touch()


def wheel_of(folder: Path, name: str, version: str) -> None:
    """The same as a wheel in `folder`."""
    distribution(folder / "unpacked", name, version)
    shutil.make_archive(str(folder / f"{name}-{version}-py3-none-any"), "zip", folder / "unpacked")
    (folder / f"{name}-{version}-py3-none-any.zip").rename(folder / f"{name}-{version}-py3-none-any.whl")
    shutil.rmtree(folder / "unpacked")


@pytest.fixture
def machine(tmp_path, wheel):
    """`machine(code, environment)` runs code, in which the kit's address is that of `wheel`, in a Python environment
    that sees the packages of this one but not the kit, which is there by a link."""
    venv.create(tmp_path / "venv", with_pip=False)
    (tmp_path / "home").mkdir()

    def run(code: str, *first: Path, **environment: str) -> subprocess.CompletedProcess:
        place = f"git+https://github.com/{address.address()}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MINI_SYMPOSIUM", "BINDER", "COLAB", "PIP"))}
        path = {"PYTHONPATH": os.pathsep.join(map(str, [*first, SITE])), "PIP_NO_INDEX": "1", "MPLBACKEND": "agg"}
        python = tmp_path / "venv" / "bin" / "python"
        command = [python, "-c", code.replace(place, str(wheel))]
        env = kept | path | environment
        return subprocess.run(command, cwd=tmp_path / "home", env=env, capture_output=True, text=True)

    return run


COLAB = {hosted.COLAB: "release-colab"}


def test_on_colab_a_notebook_installs_the_kit_and_runs_on_the_committed_numbers(machine, tmp_path):
    results, cells = tmp_path / "home" / "runs" / "proxy" / "results.json", sources("03_loss_curves")
    results.parent.mkdir(parents=True)
    results.write_text('{"01_dataset": {}}')  # notebook 01 was here before
    done = machine("\n".join(cells), **COLAB)
    assert done.returncode == 0, done.stderr
    assert "runs/proxy: the committed run's numbers" in done.stdout and "steps per rate" in done.stdout
    for name in ("06_claims", "08_examples"):
        done = machine("\n".join(sources(name)), **COLAB)
        assert done.returncode == 0 and "committed run's" not in done.stdout, done.stderr
    assert set(json.loads(results.read_text())) == {"01_dataset", "03_loss_curves", "06_claims", "08_examples"}
    site = next((tmp_path / "venv" / "lib").glob("*/site-packages"))
    assert (site / "mini_symposium" / "shipped" / "data").is_dir()
    assert machine(cells[0].replace('"pip"', '"nothing_is_installed_again"'), **COLAB).returncode == 0


def test_elsewhere_nothing_is_installed_and_nothing_written(machine, tmp_path):
    done = machine(sources("04_merge")[0])
    assert "No module named 'mini_symposium'" in done.stderr
    done = machine(sources("04_merge")[0], ROOT)
    assert done.stdout == "Not on Colab or Binder: nothing to install.\n", done.stderr
    assert machine(sources("07_playground")[0], ROOT, VOILA_BASE_URL="/").stdout == ""
    assert machine(sources("04_merge")[0], ROOT, MINI_SYMPOSIUM_HEADLESS="1", **COLAB).stdout == done.stdout
    assert list((tmp_path / "home").iterdir()) == []


def test_on_binder_what_needs_a_run_says_how_to_get_one(machine):
    done = machine(sources("04_merge")[0], ROOT, BINDER_REPO_URL="https://example.org")
    assert 'Run notebook 02 with RECIPE = "tiny" first' in done.stdout, done.stderr
    assert machine(sources("01_dataset")[0], ROOT, BINDER_REPO_URL="https://example.org").stdout == ""


def test_colab_keeps_what_its_kernel_runs_on_and_gets_the_rest_as_pinned(machine, tmp_path):
    old, wheels = tmp_path / "old", tmp_path / "wheels"
    for name in ("torch", "IPython", "filelock"):
        distribution(old, name, "1.0")
    [pinned] = re.findall(r"^filelock==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    wheel_of(wheels, "filelock", pinned)
    wheel_of(wheels, "ipython", "2.0")
    code = "import IPython\nfrom mini_symposium.reproduce.hosted import *\n"
    assert machine(f"{code}print(missing(loaded() | KEPT))", old, ROOT).stdout == f"['filelock=={pinned}']\n"

    found = {"PIP_FIND_LINKS": str(wheels)}
    done = machine(f"import IPython\n{sources('01_dataset')[0]}", old, **found, **COLAB)
    assert done.returncode == 0 and "Colab's own versions" in done.stdout, done.stderr
    done = machine(f"{code}install(['ipython==2.0'], loaded())", old, ROOT, **found)
    assert "conflicting dependencies" in done.stderr
    site = next((tmp_path / "venv" / "lib").glob("*/site-packages"))
    assert {path.name.partition("-")[0] for path in site.glob("*.dist-info")} == {"filelock", "mini_symposium"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_links_to_itself_and_names_the_projects_address(path):
    text = path.read_text(encoding="utf-8")
    assert address.addressed(text, address.address()) == text, "run `make readme`"
    assert address.addressed(text, "ada/kit") != text
    place = address.address()
    head = nbformat.reads(text, as_version=4).cells[0].source
    assert f"(https://colab.research.google.com/github/{place}/blob/main/notebooks/{path.name})" in head
    assert f"(https://mybinder.org/v2/gh/{place}/main?urlpath=lab/tree/notebooks/{path.name})" in head
    assert path.stem in {*hosted.READING, *hosted.LOADING, "01_dataset", "02_finetune"}
