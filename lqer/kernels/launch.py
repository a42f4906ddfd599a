"""Which kernels run a layer for how many tokens.

Shapes: M tokens, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lqer.kernels import runtime
from lqer.kernels.codebooks.launch import run_codebook
from lqer.kernels.dequantize_launch import run_dequantized
from lqer.kernels.fusion import UNFUSED, Fused
from lqer.kernels.gluon.launch import fits_gluon
from lqer.kernels.gluon.stream_launch import run_stream
from lqer.kernels.gluon.tall_launch import run_tall
from lqer.kernels.input_launch import dense_rows
from lqer.kernels.integers.groups_wide import BITS as WIDE_BITS
from lqer.kernels.integers.launch import (
    fits_gemm,
    fits_gemv,
    rows_together,
    run_gemm,
    run_gemv,
    run_groups,
    run_wide,
)
from lqer.kernels.joint import segment_numbers
from lqer.kernels.lattice.halves_launch import AT_ONCE as LATTICE_AT_ONCE
from lqer.kernels.lattice.halves_launch import run_lattice_halves
from lqer.kernels.lattice.launch import run_lattice
from lqer.kernels.layout.codebook import CodebookLayout
from lqer.kernels.layout.codes import Layout
from lqer.kernels.layout.groups import GroupLayout
from lqer.kernels.layout.lattice import LatticeLayout
from lqer.kernels.layout.tiles import TiledLayout
from lqer.kernels.layout.trellis import PackedTrellis, TrellisLayout
from lqer.kernels.packed import PackedLinear
from lqer.kernels.rotations.launch import kernels_rotate, prepare_rotations, run_between_rotations
from lqer.kernels.spec import Spec
from lqer.kernels.trellis.launch import run_trellis, table_of
from lqer.kernels.trellis.resident_launch import run_resident
from lqer.kernels.tuning import (
    bucket_of,
    gemm_launch,
    gemv_launch,
    group_launch,
    stream_launch,
    tall_launch,
    wide_launch,
)

# With more tokens than these, dequantizing the weight and calling a library is faster.
CODEBOOK_TOKENS = 16
ROTATED_TOKENS = 64
# Trellis codes that are looked up take up to so many at once.
LOOKED_UP_AT_ONCE = 16
# From so many on, lattice codes are decoded to float16 for all tokens, instead of multiplied as integers.
HALVES_FROM = 5
GROUP_TOKENS = 64
# Integer groups of four bits, as operands of wgmma.
WIDE_FROM, WIDE_TOKENS = 17, 128
# Four-bit codes without a branch or of rounded tokens, by the kernels in Gluon where they run: up to so many tokens by
# gluon/stream_gemm.py, above that by gluon/tall_gemm.py.
STREAM_FROM, STREAM_TOKENS, TALL_TOKENS = 33, 128, 512


def prepare_tables(packed: PackedLinear) -> None:
    """Compute what kernels read besides a layer's own tensors, once for all of its kind, before it is called.

    Within a call it might be allocated where a CUDA graph that is being recorded keeps what it overwrites.
    """
    device, spec = packed.workspace.device, packed.spec
    if device.type != "cuda":
        return
    segment_numbers(spec, device)
    if isinstance(packed.weight, PackedTrellis):
        table_of(packed.weight)
    if packed.input_signs_I is not None and kernels_rotate(spec):
        prepare_rotations(spec, device)


def makes_inputs(spec: Spec, rotated: bool, tokens: int) -> bool:
    """Whether the launches of a linear make its inputs, by a norm or a gate, for so many tokens."""
    few = tokens <= ROTATED_TOKENS and not spec.rounding.bits
    return rotated and few and isinstance(spec.layout, TiledLayout) and kernels_rotate(spec)


def adds_residual(spec: Spec, rotated: bool, tokens: int) -> bool:
    """Whether the launches of a linear add a residual to its outputs for so many tokens."""
    few_integers = isinstance(spec.layout, Layout | GroupLayout) and tokens < STREAM_FROM
    return few_integers or makes_inputs(spec, rotated, tokens)


def run_layer(x_MI: Tensor, packed: PackedLinear, fused: Fused = UNFUSED) -> Tensor:
    """y [M, O] of x [M, I], both in packed.dtype, by the kernels that the table names."""
    layout = packed.spec.layout
    if isinstance(layout, LatticeLayout):
        few = len(x_MI) < HALVES_FROM
        return run_rotated_layer(x_MI, packed, run_lattice if few else run_lattice_halves, LATTICE_AT_ONCE, fused)
    if isinstance(layout, TrellisLayout):
        if not layout.sums_bytes:
            return run_rotated_layer(x_MI, packed, run_trellis, LOOKED_UP_AT_ONCE, fused)
        return run_rotated_layer(x_MI, packed, run_resident, ROTATED_TOKENS, fused)
    x_MI = fused.before(x_MI)
    if isinstance(layout, CodebookLayout):
        few = len(x_MI) <= CODEBOOK_TOKENS
        return fused.after(run_codebook(x_MI, packed) if few else run_dequantized(x_MI, packed))
    return _run_integers(x_MI, packed, layout, fused)


def _run_integers(x_MI: Tensor, packed: PackedLinear, layout: Layout | GroupLayout, fused: Fused) -> Tensor:
    """Outputs with the residual, of inputs that are normed."""
    if STREAM_FROM <= len(x_MI) <= TALL_TOKENS and fits_gluon(packed, x_MI):
        m, processors = len(x_MI), runtime.multiprocessors(x_MI.device)
        if m <= STREAM_TOKENS:
            return fused.after(run_stream(x_MI, packed, stream_launch(layout, m, processors)))
        return fused.after(run_tall(x_MI, packed, tall_launch(layout, m, processors)))
    if isinstance(layout, GroupLayout):
        return _run_integer_groups(x_MI, packed, layout, fused)
    if len(x_MI) == 1 and fits_gemv(packed):
        gemv = gemv_launch(layout.rows, layout.columns)
        return run_gemv(x_MI, packed, gemv, residual_1O=fused.residual_MO)
    bucket = bucket_of(len(x_MI))
    launch = bucket and gemm_launch(layout.width, layout.rows, layout.columns, bucket)
    if launch and fits_gemm(packed, len(x_MI), launch):
        return run_gemm(x_MI, packed, launch, residual_MO=fused.residual_MO)
    return fused.after(run_dequantized(x_MI, packed))


def _run_integer_groups(x_MI: Tensor, packed: PackedLinear, layout: GroupLayout, fused: Fused) -> Tensor:
    m, processors = len(x_MI), runtime.multiprocessors(x_MI.device)
    if layout.bits == WIDE_BITS and WIDE_FROM <= m <= WIDE_TOKENS:
        wide = wide_launch(layout, m, processors)
        if fits_gemm(packed, m, wide):
            return run_wide(x_MI, packed, wide, residual_MO=fused.residual_MO)
    grouped = group_launch(layout, m, processors, rows_together(packed))
    if m <= GROUP_TOKENS and fits_gemm(packed, m, grouped):
        return run_groups(x_MI, packed, grouped, residual_MO=fused.residual_MO)
    return fused.after(run_dequantized(x_MI, packed))


def run_rotated_layer(
    x_MI: Tensor,
    packed: PackedLinear,
    run_codes: Callable[..., Tensor],
    at_once: int,
    fused: Fused = UNFUSED,
) -> Tensor:
    """A layer that may have rotations: few tokens on the codes; many, and rounded ones, on the decoded weight.

    run_codes(x, packed, pdl, fused=..): up to `at_once` tokens.
    """

    def run(x: Tensor, packed: PackedLinear, fused: Fused = UNFUSED) -> Tensor:
        pdl, split = runtime.supports_pdl(x), zip(dense_rows(x).split(at_once), fused.split(len(x), at_once))
        parts = [run_codes(part, packed, pdl, fused=own) for part, own in split]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    rotated, m = packed.input_signs_I is not None, len(x_MI)
    if makes_inputs(packed.spec, rotated, m):
        return run(x_MI, packed, fused)
    x_MI = fused.before(x_MI)
    if m > ROTATED_TOKENS or packed.spec.rounding.bits:
        y_MO = run_between_rotations(x_MI, packed, run_dequantized)
    elif rotated:
        y_MO = run_between_rotations(x_MI, packed, run)
    else:
        y_MO = run(x_MI, packed)
    return fused.after(y_MO)
