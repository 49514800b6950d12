"""What the package imports is what `pip install .` brings, and no tool of the tests is among it."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, version

import pytest

from mini_symposium.run import ROOT

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
RUN_TIME = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
LISTED = {"run": list(filter(None, RUN_TIME)), **EXTRAS}


def distribution(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", requirement.partition("==")[0]).lower()


def imported() -> set[str]:
    """Top-level names that the package imports, of what is not in the standard library."""
    nodes = [n for path in (ROOT / "mini_symposium").rglob("*.py") for n in ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"mini_symposium"}


def test_what_the_package_imports_is_listed_and_no_tool_of_the_tests():
    listed = {distribution(each) for kind in ("run", "release", "ray") for each in LISTED[kind]}
    found = packages_distributions()
    missing = {name for name in imported() if not {distribution(each) for each in found.get(name, [name])} & listed}
    assert missing == set()
    assert not listed & {distribution(each) for each in LISTED["test"]}


@pytest.mark.parametrize("kind", ["run", "test"])
def test_pins_are_exact_and_name_the_installed_versions(kind):
    for requirement in LISTED[kind]:
        name, equals, pinned = requirement.partition("==")
        assert equals and version(name).partition("+")[0] == pinned, requirement
