"""Linears that read the same input, packed side by side: their outputs are segments of those of one linear.

Rows of the weights lie one below the other, so that the input is read, rounded and rotated once and one launch does the
work of several. Ranks of A do too: x A has a part for each segment. B stays [own rank, O]: the rows of a segment read
their part of x A only. Ranks and rows are padded with zeros, rows such that no tile of a kernel has rows of two
segments.

Shapes: I in_features, O out_features of all, R rank; P after a letter: padded.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

from lqer.kernels.layout.codebook import CodebookLayout
from lqer.kernels.layout.codes import ROW_PADDING
from lqer.kernels.layout.lattice import LatticeLayout
from lqer.kernels.layout.trellis import TrellisLayout
from lqer.kernels.packed import PackedLinear, weight_of, workspace_of
from lqer.kernels.spec import AnyLayout, Segment, Spec

# No program of a kernel has more rows.
LARGEST_TILE = 128
LARGEST_TRELLIS_TILE = 256
TABLE = 1  # among the parts of a lattice weight


@lru_cache
def segment_numbers(spec: Spec, device: torch.device) -> Tensor | None:
    """int32 [OP / 64]: the segment that each 64 rows belong to; None for a linear of its own, or without a branch.

    Cached on the device, because a CUDA graph must not copy from the host.
    """
    if not spec.segments or not spec.rank:
        return None
    starts = torch.tensor([segment.start for segment in spec.segments])
    rows = torch.arange(0, _padded_rows(spec.layout), ROW_PADDING)
    return (torch.searchsorted(starts, rows, right=True) - 1).to(device, torch.int32)


def kind_of(packed: PackedLinear) -> Hashable | None:
    """What linears that can be packed side by side have in common, besides signs of a rotation; None for codebooks.

    Their tables have rows of groups of the weight's own rows.
    """
    spec, layout = packed.spec, packed.spec.layout
    if isinstance(layout, CodebookLayout) or spec.segments:
        return None
    factors = (spec.a_block, packed.a_exponents is None, spec.b_block, packed.b_exponents is None)
    return (
        replace(layout, rows=0), spec.rounding, packed.dtype, packed.workspace.device, spec.rank > 0 and factors,
        packed.input_signs_I is not None, packed.output_signs_O is not None,
    )  # fmt: skip


def can_join(packed: Sequence[PackedLinear]) -> bool:
    """Whether these linears of one input can be packed side by side."""
    first = packed[0]
    if kind_of(first) is None or any(kind_of(other) != kind_of(first) for other in packed):
        return False
    signs = [other.input_signs_I for other in packed if other.input_signs_I is not None]
    return all(torch.equal(signs_I, signs[0]) for signs_I in signs)


def join(packed: Sequence[PackedLinear]) -> PackedLinear:
    """One linear whose outputs are those of all, at its segments; for linears that `can_join`."""
    first = packed[0]
    layout, own_rank = first.spec.layout, 0
    tile = LARGEST_TRELLIS_TILE if isinstance(layout, TrellisLayout) else LARGEST_TILE
    sizes = [-(-other.spec.layout.rows // tile) * tile for other in packed]
    starts = [0, *accumulate(sizes)][:-1]
    rows = [other.spec.layout.rows for other in packed]
    segments = tuple(Segment(start, own) for start, own in zip(starts, rows, strict=True))
    joint_layout = replace(layout, rows=starts[-1] + rows[-1])
    # All that follow the last segment's own rows are padding of the layout already.
    sizes[-1] = _padded_rows(joint_layout) - starts[-1]
    if first.spec.rank:
        own_rank = max(other.spec.rank for other in packed)
    spec = replace(first.spec, layout=joint_layout, rank=own_rank * len(packed), segments=segments)
    columns = joint_layout.rows

    def side_by_side(tensors: Sequence[Tensor | None], ranks: int) -> Tensor | None:
        """[ranks, O] of the tensors [.., own O], or [O] for ranks = 0; zeros in between and for those that are None."""
        given = next((tensor for tensor in tensors if tensor is not None), None)
        if given is None:
            return None
        joint = given.new_zeros((ranks, columns) if ranks else (columns,))
        for segment, tensor in zip(segments, tensors, strict=True):
            if tensor is not None:
                part = joint[: len(tensor), segment.rows_of_all] if ranks else joint[segment.rows_of_all]
                part.copy_(tensor)
        return joint

    def below(tensors: Sequence[Tensor | None], ranks: int) -> Tensor | None:
        if tensors[0] is None:
            return None
        padded = [pad(t, (0, 0, 0, ranks - len(t))) for t in tensors if t is not None]
        return torch.cat(padded)

    b_ranks = 0 if first.b_exponents is None else own_rank // first.spec.b_block
    layouts = [other.spec.layout for other in packed]
    words, high, scales, zeros = (
        first.weight.parts[place]
        if place == TABLE and isinstance(layout, LatticeLayout)
        else _rows_below([other.weight.parts[place] for other in packed], layouts, sizes)
        for place in range(4)
    )
    assert words is not None
    assert scales is not None
    return PackedLinear(
        spec=spec,
        dtype=first.dtype,
        weight=weight_of(joint_layout, words, high, scales, zeros),
        bias_O=side_by_side([other.bias_O for other in packed], 0),
        a_codes=below([other.a_codes for other in packed], own_rank),
        a_exponents=below([other.a_exponents for other in packed], own_rank),
        b_codes=side_by_side([other.b_codes for other in packed], own_rank),
        b_exponents=side_by_side([other.b_exponents for other in packed], b_ranks),
        workspace=workspace_of(joint_layout, first.workspace.device),
        input_signs_I=first.input_signs_I,
        output_signs_O=side_by_side([other.output_signs_O for other in packed], 0),
    )


def _rows_below(parts: Sequence[Tensor | None], layouts: Sequence[AnyLayout], sizes: Sequence[int]) -> Tensor | None:
    """Parts of weights one below the other, each padded with zeros to so many rows."""
    if parts[0] is None:
        return None
    padded = []
    for part, layout, size in zip(parts, layouts, sizes, strict=True):
        assert part is not None
        unit = _padded_rows(layout) // len(part)
        padded.append(torch.cat([part, part.new_zeros((size // unit - len(part), *part.shape[1:]))]))
    return torch.cat(padded)


def part_of(joint: PackedLinear, index: int, spec: Spec) -> dict[str, Tensor]:
    """The tensors of one of the linears, by the names of `PackedLinear.tensors`, as views of the joint ones.

    spec: of that linear. Its counters are those of all.
    """
    start, own_rank = joint.spec.segments[index].start, joint.spec.own_rank
    rows = joint.spec.segments[index].rows_of_all
    named = joint.tensors()
    for name in ("words", "high", "scales", "zeros"):
        if name in named and not (name == "high" and isinstance(spec.layout, LatticeLayout)):
            unit = _padded_rows(joint.spec.layout) // len(named[name])
            named[name] = named[name][start // unit : (start + _padded_rows(spec.layout)) // unit]
    for name in ("a_codes", "a_exponents"):
        if name in named:
            named[name] = named[name][index * own_rank : index * own_rank + spec.rank]
    for name, ranks in (("b_codes", spec.rank), ("b_exponents", spec.rank // spec.b_block)):
        if name in named:
            named[name] = named[name][:ranks, rows]
    for name in ("bias", "output_signs"):
        if name in named:
            named[name] = named[name][rows]
    return named


def _padded_rows(layout: AnyLayout) -> int:
    assert not isinstance(layout, CodebookLayout)
    return layout.padded_rows
