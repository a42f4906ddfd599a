"""The package's structure: which room may import which, how long a file may be, and what the letters of shapes mean.

A room is a folder of lqer/ or a file at its top. ROOMS lists them from the ground up; a room imports only rooms that
stand before it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lqer"
MATHEMATICS = ["formats", "statistics", "lowrank", "rounding", "transforms", "methods", "kernels"]
ROOMS = [
    "errors", "components", "phases", *MATHEMATICS, "store", "data", "nn", "models", "config", "evaluation",
    "checkpoint", "serve", "training", "__init__", "results", "export", "stages", "jobs", "report", "resources", "run",
    "cli",
]  # fmt: skip
# Kernels of algorithms, not of linears; imported only where a tensor is on a GPU.
KERNELS_ELSEWHERE = {
    "formats/e8_kernel.py", "formats/kmeans_kernel.py", "formats/mxint_kernel.py", "formats/viterbi_kernel.py",
    "rounding/lattice_sweep.py", "rounding/lattice_tuning.py", "rounding/level_sweep.py", "rounding/soft_kernel.py",
    "rounding/sweep.py", "rounding/vector_sweep.py",
    "statistics/products_kernel.py", "transforms/hadamard_kernel.py", "transforms/lwc_kernel.py",
}  # fmt: skip
MOST_ROOMS, MOST_LEVELS = 28, 12
MOST_LINES = {"run/pipeline.py": 200}
MOST_LINES_ELSEWHERE = 400
# Letters that mean the same in every file: linears, activations, groups of a row and values of a group.
LEGEND = set("IORBTDVGg")
FILES = sorted(PACKAGE.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(module: str) -> str:
    """The room of a dotted module of this package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file; those for type checkers alone too."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "lqer":
            names = [alias.name for alias in node.names]
            yield from (f"lqer.{name}" if (PACKAGE / name).exists() or (PACKAGE / f"{name}.py").exists() else "lqer"
                        for name in names)  # fmt: skip
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: relative import"
            yield node.module or ""


def imported_modules(path: Path) -> Iterator[Path]:
    """The files of this package that a file imports, wherever in it, when a program runs: not for type checkers."""
    tree = tree_of(path)
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    left_out = {id(inner) for node in typing for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and id(node) not in left_out
            and (node.module or "").split(".")[0] == "lqer"
        ):
            folder = PACKAGE.parent.joinpath(*str(node.module).split("."))
            inside = [(folder / alias.name).with_suffix(".py") for alias in node.names]
            found = [file for file in inside if file in FILES]
            yield from found or [folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")]


def edges() -> dict[str, set[str]]:
    """Of each room, the other rooms that it imports."""
    found: dict[str, set[str]] = {}
    for path in FILES:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        room = parts[0]
        rooms = {room_of(module) for module in imported(path) if module.split(".")[0] == "lqer"}
        found.setdefault(room, set()).update(rooms - {room})
    return found


def test_every_room_has_its_place():
    assert sorted(edges()) == sorted(ROOMS)
    assert len(ROOMS) <= MOST_ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_below_it(room):
    assert edges()[room] <= set(ROOMS[: ROOMS.index(room)])


def test_no_two_modules_import_each_other_not_even_by_way_of_others():
    graph = {path: set(imported_modules(path)) - {path} for path in FILES}
    assert set().union(*graph.values()) <= set(FILES)
    # Raises CycleError, with the modules of a circle.
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)


def test_rooms_stand_on_few_levels():
    found, levels = edges(), {}
    for room in ROOMS:
        levels[room] = 1 + max((levels[below] for below in found[room]), default=0)
    assert max(levels.values()) <= MOST_LEVELS


@pytest.mark.parametrize("room", MATHEMATICS)
def test_mathematics_imports_nothing_of_the_pipeline(room):
    """Torch and the standard library, Triton for the kernels; of this package only mathematics and components."""
    for path in (PACKAGE / room).rglob("*.py"):
        allowed = {*sys.stdlib_module_names, "torch", "lqer"}
        if room == "kernels" or relative(path) in KERNELS_ELSEWHERE:
            allowed.add("triton")
        modules = list(imported(path))
        assert {module.split(".")[0] for module in modules} <= allowed, relative(path)
        ours = {room_of(module) for module in modules if module.split(".")[0] == "lqer"}
        assert ours <= {*MATHEMATICS, "components"}, relative(path)


def test_no_file_is_long():
    lengths = {relative(path): len(path.read_text().splitlines()) for path in FILES}
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES.get(name, MOST_LINES_ELSEWHERE)}


# A lower-case name that ends in a shape: weight_OI, codes_RG8, x_Gg. A digit is a size.
SHAPED = re.compile(r"_?[a-z][a-z0-9_]*?_([A-Za-z0-9]*[A-Z][A-Za-z0-9]*)")


def shaped_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(name, shape) of every variable, argument and attribute that is set and whose name ends in a shape."""
    for node in ast.walk(tree):
        name = None
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            name = node.attr
        if name is not None and (match := SHAPED.fullmatch(name)):
            yield name, match[1]


def declared(path: Path) -> set[str]:
    """The letters that the paragraph after "Shapes:" explains, in any docstring of the file."""
    texts = [
        ast.get_docstring(node) or ""
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    paragraphs = [text[start.end() :].split("\n\n")[0] for text in texts for start in re.finditer("Shapes:", text)]
    return {letter for paragraph in paragraphs for letter in re.findall(r"\b[A-Za-z]\b", paragraph)}


@pytest.mark.parametrize("room", ROOMS)
def test_every_letter_of_a_shape_is_declared(room):
    unknown = set()
    for path in FILES:
        if path.relative_to(PACKAGE).with_suffix("").parts[0] == room:
            letters = LEGEND | declared(path) | set("0123456789")
            names = {name for name, shape in shaped_names(tree_of(path)) if not letters.issuperset(shape)}
            unknown |= {f"{relative(path)}: {name}" for name in names}
    assert not unknown
