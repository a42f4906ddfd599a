"""What is installed is what is imported: requirements.txt, the extras and the requirements of tests say the same."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import tomli
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
# An engine: whoever runs lqer/serve has it.
ENGINES = {"vllm"}
# transformers reads tokenizers of two kinds with them.
READ_BY_OTHERS = {"protobuf", "sentencepiece"}


def requirements(lines: list[str]) -> dict[str, Requirement]:
    """By canonical name."""
    found = [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


RUNTIME = requirements((ROOT / "requirements.txt").read_text().splitlines())
TESTS = requirements((ROOT / "requirements-dev.txt").read_text().splitlines())
PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = [requirements(extra) for extra in PROJECT["optional-dependencies"].values()]


def imported(folder: str) -> set[str]:
    """The distributions of all modules that the files of a folder import, wherever in them."""
    modules = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(str(node.module).split(".")[0])
    installed = packages_distributions()
    found = {name for module in modules - sys.stdlib_module_names for name in installed.get(module, [module])}
    return {canonicalize_name(name) for name in found - {"lqer"}}


def test_every_library_that_the_package_imports_is_required():
    assert imported("lqer") - RUNTIME.keys() - set().union(*EXTRAS) <= ENGINES


def test_every_library_that_is_required_is_imported():
    assert RUNTIME.keys() - imported("lqer") - imported("experiments") == READ_BY_OTHERS


def test_a_library_is_required_in_one_place_or_with_the_same_bounds():
    assert not [extra.keys() & RUNTIME.keys() for extra in EXTRAS if extra.keys() & RUNTIME.keys()]
    assert not TESTS.keys() & RUNTIME.keys()
    for extra in EXTRAS:
        for name in extra.keys() & TESTS.keys():
            assert extra[name].specifier == TESTS[name].specifier


def test_the_environment_of_conda_installs_the_same_requirements():
    assert "- -r requirements.txt" in (ROOT / "environment.yml").read_text()
