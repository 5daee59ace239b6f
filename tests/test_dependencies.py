"""pyproject.toml names whatever the package imports, each with a floor and a cap."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    return {canonical(re.split(r"[^\w.-]", requirement, maxsplit=1)[0]) for requirement in requirements}


DECLARED = names(PROJECT["dependencies"])
EXTRAS = set().union(*(names(extra) for extra in PROJECT["optional-dependencies"].values()))


def imported() -> dict[str, tuple[str, bool]]:
    """The packages of others that dpo_cli imports: where, and whether every run of that module imports it."""
    found: dict[str, tuple[str, bool]] = {}
    for path in sorted((ROOT / "dpo_cli").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        optional = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.Try | ast.FunctionDef)
            for inner in ast.walk(node)
            if isinstance(inner, ast.Import | ast.ImportFrom)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                tops = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                tops = [node.module.split(".")[0]]
            else:
                continue
            for top in tops:
                if top != "dpo_cli" and top not in sys.stdlib_module_names:
                    found[top] = str(path), node in optional and found.get(top, ("", True))[1]
    return found


@pytest.mark.parametrize("name", sorted(imported()))
def test_what_is_imported_is_declared(name: str) -> None:
    where, optional = imported()[name]
    # Of an optional package that is not installed here only the module's name is known.
    distributions = {canonical(one) for one in packages_distributions().get(name, [name])}
    assert distributions & (DECLARED | EXTRAS if optional else DECLARED), f"{where} imports {name}"


def test_a_version_of_which_nothing_is_known_is_not_allowed() -> None:
    for requirement in PROJECT["dependencies"]:
        assert re.search(r">=[\d.]+,<[\d.]+$", requirement), requirement
