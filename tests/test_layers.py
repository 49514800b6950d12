"""The house holds: a folder imports only from the floors above it, nothing goes in a circle, and what needs no torch
loads none."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest

from mini_symposium.run import ROOT

PACKAGE = ROOT / "mini_symposium"
FLOORS = (
    *("__init__", "errors", "files", "recipe", "run", "data", "models", "evaluation", "training", "claims"),
    *("figures", "release", "playground", "reproduce", "cli", "__main__"),
)
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:  # a module of a folder, or a name in a module
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else node.module)
    return {name if name in MODULES else f"{name}.__init__" for name in found if name.partition(".")[0] == PACKAGE.name}


IMPORTS = {name: imported(path) for name, path in MODULES.items()}


def floor(module: str) -> int:
    return FLOORS.index(module.split(".")[1])


def test_imports_are_read():
    arrows = sum(map(len, IMPORTS.values()))
    assert arrows > 150 and "mini_symposium.run" in IMPORTS["mini_symposium.training.finetune"]
    assert "mini_symposium.models.base_models" in IMPORTS["mini_symposium.models.adapters"]  # inside a function


def test_a_folder_imports_only_from_the_floors_above_it():
    against = [f"{a} imports {b}" for a, some in IMPORTS.items() for b in some if floor(b) > floor(a)]
    assert against == []


def test_no_import_goes_in_a_circle():
    TopologicalSorter(IMPORTS).prepare()


def test_every_floor_is_there_and_nothing_else():
    entries = {path.stem for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert entries == {*FLOORS, "recipes"}
    assert len(entries) <= 20


WITHOUT_TORCH = [name for name in MODULES if name.split(".")[1] in ("claims", "figures")]


@pytest.mark.parametrize("modules", [["mini_symposium"], ["mini_symposium.cli.main"], WITHOUT_TORCH], ids=len)
def test_what_needs_no_torch_loads_none(modules):
    code = f"import sys; sys.modules['torch'] = None; import {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-c", code.replace(".__init__", "")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readmes_tree_is_the_one_on_disk():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme[readme.index("mini_symposium/     the package") : readme.index("data/               the thirteen")]
    named = [name.rstrip("/,") for line in tree.splitlines()[1:] for name in line[:20].split()]
    assert [name for name in named if name != "recipes"] == list(FLOORS)


def test_every_module_with_logic_has_tests_of_its_own():
    """tests/<folder>/test_<module>.py; what has none is covered by tests of whole flows, or has no logic."""
    alone = {
        "mini_symposium.__main__",
        "mini_symposium.cli.options",  # types of options
        "mini_symposium.release.llama_cpp_server",  # a program, run by test_gguf
    }
    lacking = {
        name
        for name, path in MODULES.items()
        if path.stem != "__init__"
        and not (ROOT / "tests" / path.relative_to(PACKAGE).with_name(f"test_{path.name}")).is_file()
    }
    assert lacking <= alone, sorted(lacking - alone)


def test_names_of_the_package_are_found_without_torch_and_documented():
    import mini_symposium

    code = "import sys, mini_symposium; sys.exit('torch' in sys.modules or not mini_symposium.__all__)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    for name in chain(mini_symposium.__all__):
        assert getattr(mini_symposium, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mini_symposium.nothing
