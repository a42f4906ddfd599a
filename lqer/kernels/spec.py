"""What kernels of a packed linear are compiled for, and its form as a string, which an operator takes.

Shapes: I in_features, O out_features, R rank.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cache

from lqer.kernels.layout.codebook import CodebookLayout
from lqer.kernels.layout.codes import Layout
from lqer.kernels.layout.groups import GroupLayout
from lqer.kernels.layout.lattice import LatticeLayout
from lqer.kernels.layout.trellis import TrellisLayout

AnyLayout = Layout | GroupLayout | CodebookLayout | LatticeLayout | TrellisLayout


@dataclass(frozen=True)
class ActivationRounding:
    """MXINT rounding of activations. Frozen: kernels take it as one compile-time argument."""

    bits: int = 0  # 0: activations are not rounded
    block: int = 16
    ceil: bool = True  # scale_rounding "ceil", else "floor"


@dataclass(frozen=True)
class Segment:
    """The rows of one linear among those of several that are packed side by side (joint.py)."""

    start: int
    rows: int

    @property
    def rows_of_all(self) -> slice:
        return slice(self.start, self.start + self.rows)


@dataclass(frozen=True)
class Spec:
    """All that describes a packed linear besides its tensors and their dtype."""

    layout: AnyLayout
    rounding: ActivationRounding
    rank: int  # padded; of all segments together
    a_block: int
    b_block: int
    segments: tuple[Segment, ...] = ()  # none for a linear of its own
    # The spec as a string, because a custom operator takes no dataclass; encoded once for all calls.
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", encode_spec(self))

    @property
    def own_rank(self) -> int:
        """Rank of a segment: its rows read so many elements of x A."""
        return self.rank // max(1, len(self.segments))


def encode_spec(spec: Spec) -> str:
    """A spec as a string: the name of the layout, then numbers."""
    rounding = spec.rounding
    segments = [number for segment in spec.segments for number in dataclasses.astuple(segment)]
    numbers = (
        len(spec.segments), *segments, *dataclasses.astuple(spec.layout), rounding.bits, rounding.block, rounding.ceil,
        spec.rank, spec.a_block, spec.b_block,
    )  # fmt: skip
    return ",".join([type(spec.layout).__name__, *(str(int(number)) for number in numbers)])


@cache
def decode_spec(text: str) -> Spec:
    """The inverse of `encode_spec`."""
    kind, count, *numbers = text.split(",")
    ends = [int(number) for number in numbers[: 2 * int(count)]]
    segments = tuple(Segment(*pair) for pair in zip(ends[::2], ends[1::2], strict=True))
    *fields, x_bits, x_block, ceil, rank, a_block, b_block = map(int, numbers[len(ends) :])
    layout: AnyLayout
    if kind == CodebookLayout.__name__:
        layout = CodebookLayout(*fields)
    elif kind == LatticeLayout.__name__:
        layout = LatticeLayout(*fields)
    elif kind == TrellisLayout.__name__:
        layout = TrellisLayout(*fields)
    elif kind == GroupLayout.__name__:
        rows, columns, bits, group, symmetric, bfloat = fields
        layout = GroupLayout(rows, columns, bits, group, bool(symmetric), bool(bfloat))
    else:
        columns, bits, offset, block, exponents, mid_rise, rows = fields
        layout = Layout(columns, bits, offset, block, bool(exponents), bool(mid_rise), rows)
    return Spec(layout, ActivationRounding(x_bits, x_block, bool(ceil)), rank, a_block, b_block, segments)
