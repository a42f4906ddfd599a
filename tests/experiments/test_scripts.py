"""Every script explains itself, on a machine without a GPU, and the list of scripts is complete."""

from __future__ import annotations

import argparse
import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [path for path in sorted((ROOT / "experiments").glob("*.py")) if "__main__" in path.read_text()]
# pipeline.py and sweep.py hand their arguments to lqer.cli.
PARSING = [path for path in SCRIPTS if "argparse" in path.read_text()]


@pytest.mark.parametrize("script", PARSING, ids=lambda path: path.stem)
def test_the_help_of_a_script_has_its_docstring_and_every_option_that_it_shows(script, monkeypatch, capsys):
    defined: set[str] = set()
    add_argument = argparse._ActionsContainer.add_argument

    def noted(self, *names, **settings):
        defined.update(names)
        return add_argument(self, *names, **settings)

    monkeypatch.setattr(argparse._ActionsContainer, "add_argument", noted)
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code in (0, None)
    docstring = ast.get_docstring(ast.parse(script.read_text())) or ""
    shown = capsys.readouterr().out
    assert shown.startswith("usage:")
    assert docstring.splitlines()[0] in shown
    # Dotted options are keys of a configuration; those in backticks another program's.
    options = re.findall(r"(?<![\w-])--[a-z][a-z-]*(?![\w.-])", re.sub(r"`[^`]*`", "", docstring))
    assert set(options) <= defined


def test_a_script_of_the_list_is_there_and_every_one_is_listed_once():
    listed = re.findall(r"^\| `(\w+\.py)` \|", (ROOT / "experiments/README.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == [path.name for path in SCRIPTS]


def test_a_script_is_imported_by_no_other_file_of_the_experiments():
    names = "|".join(path.stem for path in SCRIPTS)
    imports = re.compile(rf"^\s*(?:import|from) (?:{names})\b", flags=re.MULTILINE)
    assert not [path for path in (ROOT / "experiments").rglob("*.py") if imports.search(path.read_text())]
