"""The packed linear in plain torch: used without a GPU, and the reference that kernels are compared with.

It shares no code with the kernels except the packed tensors' layout.

Shapes: M tokens, I in_features, O out_features, R rank, B blocks of a row, G groups of columns, W words, U units,
V indices of a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lqer.formats import MXInt
from lqer.kernels.layout.codebook import PackedCodebook
from lqer.kernels.layout.codes import PackedWeight, unpack_codes
from lqer.kernels.layout.groups import PackedGroups, unpack_groups
from lqer.kernels.layout.lattice import PackedLattice, unpack_points
from lqer.kernels.layout.trellis import PackedTrellis, unpack_values
from lqer.kernels.packed import AnyWeight, PackedLinear
from lqer.kernels.spec import Segment
from lqer.transforms.hadamard import run_rotated


def reference_linear(x_MI: Tensor, packed: PackedLinear) -> Tensor:
    """y [M, O] in packed.dtype, computed in float32."""
    rotation = packed.rotation
    if rotation is None:
        return _linear(x_MI, packed).to(packed.dtype)
    inner = replace(packed, bias_O=None)
    return run_rotated(x_MI, rotation, packed.bias_O, lambda x: _linear(x, inner)).to(packed.dtype)


def _linear(x_MI: Tensor, packed: PackedLinear) -> Tensor:
    """y [M, O] float32, without rotations."""
    spec = packed.spec
    x32_MI = _round(x_MI.to(torch.float32), packed)
    y_MO = x32_MI @ reference_weight(packed.weight, packed.dtype).to(torch.float32).T
    if packed.bias_O is not None:
        y_MO += packed.bias_O.to(torch.float32)
    if packed.a_codes is not None and packed.b_codes is not None:
        a_exponents = None if packed.a_exponents is None else packed.a_exponents.T
        a_IR = _factor(packed.a_codes.T, a_exponents, spec.a_block)[: x_MI.shape[1]]
        b_RO = _factor(packed.b_codes, packed.b_exponents, spec.b_block)
        xa_MR = _round(x32_MI @ a_IR, packed).to(packed.dtype).to(torch.float32)
        segments, branch_MO = spec.segments or (Segment(0, spec.layout.rows),), torch.zeros_like(y_MO)
        for segment, own_MR in zip(segments, xa_MR.split(spec.own_rank, 1), strict=True):
            rows = segment.rows_of_all
            branch_MO[:, rows] = _round(own_MR @ b_RO[:, rows], packed)
        y_MO += branch_MO
    return y_MO


def reference_weight(weight: AnyWeight, dtype: torch.dtype) -> Tensor:
    """The weight [O, I] in `dtype`, rounded once from its exact value."""
    if isinstance(weight, PackedCodebook):
        return _look_up(weight)
    if isinstance(weight, PackedLattice):
        return (unpack_points(weight) * weight.scales[: weight.layout.rows, None]).to(dtype)
    if isinstance(weight, PackedTrellis):
        return (unpack_values(weight) * weight.scales[: weight.layout.rows, None]).to(dtype)
    if isinstance(weight, PackedGroups):
        return _group_values(weight).to(dtype)
    layout = weight.layout
    codes_OI = unpack_codes(weight).to(torch.float32)
    scales_OB = _in_rows(weight.scales, weight)
    if layout.exponents:
        scales_OB = torch.where(scales_OB > 0, torch.exp2(scales_OB.to(torch.float32) - 127), 0.0)
    block_I = torch.arange(layout.columns, device=codes_OI.device) // layout.block
    codes_OI += layout.offset - layout.origin
    if weight.zeros is not None:
        codes_OI = codes_OI - _in_rows(weight.zeros, weight).to(torch.float32)[:, block_I]
    return (codes_OI * scales_OB.to(torch.float32)[:, block_I]).to(dtype)


def _group_values(weight: PackedGroups) -> Tensor:
    codes_OI, scales_OG, zeros_OG = unpack_groups(weight)
    group_I = torch.arange(weight.layout.columns, device=codes_OI.device) // weight.layout.group
    return (codes_OI - zeros_OG[:, group_I]).to(torch.float32) * scales_OG.to(torch.float32)[:, group_I]


def _look_up(weight: PackedCodebook) -> Tensor:
    layout = weight.layout
    device = weight.words.device
    words_OGW = weight.words.mT.flatten(0, 1)[: layout.rows].unflatten(1, (layout.column_groups, layout.words))
    units_OGU = _fields(words_OGW, layout.unit_bits).mT.flatten(2)
    index_OGV = _fields(units_OGU, layout.field)[..., : layout.unit // layout.dimension].flatten(2)
    index_OGV = index_OGV[..., : layout.group_columns // layout.dimension]
    row_O, group_G = torch.arange(layout.rows, device=device), torch.arange(layout.column_groups, device=device)
    values = weight.table[(row_O // layout.group_rows)[:, None, None], group_G[None, :, None], index_OGV]
    return values.flatten(1)[:, : layout.columns]


def _fields(words: Tensor, bits: int) -> Tensor:
    """Split int32 words into fields of `bits` bits [..., 32 / bits], the lowest first."""
    return (words.unsqueeze(-1) >> torch.arange(0, 32, bits, device=words.device)) & ((1 << bits) - 1)


def _in_rows(scales: Tensor, weight: PackedWeight) -> Tensor:
    """Packed scales or zeros to [O, B]."""
    layout = weight.layout
    if layout.halves > 1:
        scales = scales.unflatten(-1, (layout.halves, -1)).transpose(-1, -2).flatten(-2)
    return scales.transpose(1, 2).reshape(layout.padded_rows, -1)[: layout.rows]


def _factor(codes: Tensor, exponents: Tensor | None, block: int) -> Tensor:
    values = codes.to(torch.float32)
    if exponents is None:
        return values
    steps = torch.where(exponents > 0, torch.exp2(exponents.to(torch.float32) - 127), 0.0)
    return values * steps.repeat_interleave(block, dim=0)


def _round(x: Tensor, packed: PackedLinear) -> Tensor:
    rounding = packed.spec.rounding
    if rounding.bits == 0:
        return x
    return MXInt(rounding.bits, rounding.block, "ceil" if rounding.ceil else "floor").fake_quantize(x)
