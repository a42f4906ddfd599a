"""Print the tables of docs/serving.md: which target takes which number format, and what stands beside it.

python -m lqer.export.matrix

The answers are those of the targets themselves, for a linear of 1024 x 1024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from lqer.export import Target
from lqer.export.source import LinearSpec
from lqer.formats import E8P, MX, Codebook, Int, MXInt, NormalFloat, NumberFormat, Trellis
from lqer.formats.mx import ELEMENTS
from lqer.transforms.hadamard import hadamard
from lqer.transforms.quarot import OnlineRotation

SIZE = 1024
WIDTHS = range(2, 9)
INT8_ROW = Int(bits=8, block_size="row", symmetric=True)
INT8_TOKEN = Int(bits=8, block_size="row", symmetric=True, scale_dtype="float32")

# Each makes the format of a width in bits.
FAMILIES: dict[str, Callable[[int], NumberFormat]] = {
    "`mxint`, blocks of 16": lambda bits: MXInt(bits=bits, block_size=16),
    "`mxint`, blocks of 32": lambda bits: MXInt(bits=bits, block_size=32),
    "`mxint`, mid-rise": lambda bits: MXInt(bits=bits, block_size=32, levels="mid-rise"),
    "`int`, symmetric, groups of 32": lambda bits: Int(bits=bits, block_size=32, symmetric=True),
    "`int`, zero points, groups of 128": lambda bits: Int(bits=bits, block_size=128),
    "`int`, symmetric, a scale a row": lambda bits: Int(bits=bits, block_size="row", symmetric=True),
    "`int`, zero points, a scale a row": lambda bits: Int(bits=bits, block_size="row"),
}
SINGLE: dict[str, NumberFormat] = {
    **{f"`mx`, {element}": MX(element=element) for element in ELEMENTS},  # type: ignore[arg-type]
    "`normal-float`": NormalFloat(bits=4),
    "`codebook`": Codebook(bits=2),
    "`e8p`": E8P(bits=2),
    "`trellis`": Trellis(bits=2),
}
PLAIN = LinearSpec("linear", MXInt(bits=4, block_size=32), SIZE, SIZE)
BESIDE = {
    "low-rank factors": replace(PLAIN, rank=32),
    "a `hadamard` basis": replace(PLAIN, is_rotated=True),
    "`quarot`: inputs rotated at run time": replace(PLAIN, online=OnlineRotation(hadamard)),
    "inputs rounded to `mxint`": replace(PLAIN, activation=MXInt(bits=8)),
    "inputs rounded to 8-bit `int` by token, weights to 8-bit `int` by row": replace(
        PLAIN, format=INT8_ROW, activation=INT8_TOKEN
    ),
}


def targets() -> list[Target]:
    """One of each kind, with its defaults."""
    return [Target.registry[kind]() for kind in sorted(Target.registry)]


def formats_table() -> str:
    """Which widths of each number format a target takes."""
    rows = [[label, *(_widths(target, family) for target in targets())] for label, family in FAMILIES.items()] + [
        [label, *("yes" if _takes(target, replace(PLAIN, format=one)) else "–" for target in targets())]
        for label, one in SINGLE.items()
    ]
    return _table("format of the weights", rows)


def features_table() -> str:
    """What a target does with everything that stands beside the codes of a weight."""
    return _table(
        "besides", [[label, *(_carried(target, spec) for target in targets())] for label, spec in BESIDE.items()]
    )


def _carried(target: Target, spec: LinearSpec) -> str:
    if not _takes(target, spec):
        return "–"
    return "yes" if target.keeps_activation(spec) else "not rounded"


def _takes(target: Target, spec: LinearSpec) -> bool:
    return target.unsupported(spec) is None


def _widths(target: Target, family: Callable[[int], NumberFormat]) -> str:
    taken = [bits for bits in WIDTHS if _takes(target, replace(PLAIN, format=family(bits)))]
    if len(taken) == len(WIDTHS):
        return f"{taken[0]} to {taken[-1]} bits"
    return ", ".join(map(str, taken)) or "–"


def _table(corner: str, rows: Iterable[list[str]]) -> str:
    header = [corner, *(f"`{target.kind}`" for target in targets())]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(f"{formats_table()}\n\n{features_table()}")
