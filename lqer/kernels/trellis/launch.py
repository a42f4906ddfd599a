"""Host side of the kernels for trellis codes.

Shapes: M tokens, I in_features, O out_features, R rank; P marks padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from lqer.kernels.fusion import UNFUSED, Fused
from lqer.kernels.joint import segment_numbers
from lqer.kernels.layout.codes import ROW_PADDING, ROWS
from lqer.kernels.layout.tiles import SPANS
from lqer.kernels.layout.trellis import PackedTrellis, TrellisLayout, lookup_table
from lqer.kernels.packed import PackedLinear
from lqer.kernels.rotations.launch import Tokens, ranks_of_a_split, run_rotated_product
from lqer.kernels.runtime import launch_options, multiprocessors
from lqer.kernels.trellis.byte_sums_dequantize import byte_sums_dequantize_kernel
from lqer.kernels.trellis.decode import TOKENS_AT_ONCE
from lqer.kernels.trellis.gemm import trellis_dequantize_kernel, trellis_product_kernel


@dataclass(frozen=True)
class TrellisLaunch:
    # Of a program; each computes 16 rows. At least two: within one warp Triton gathers without shared memory.
    warps: int
    span: int  # tiles of 128 columns for one program; divides the layout's span


# Many warps share one table, and a thread holds little of it while it is copied.
WARPS = 16
DEQUANTIZE_WARPS = 4
# What a program takes besides its tiles, in tiles: its table, its first codes and the end.
OVERHEAD = 4


@lru_cache
def best_launch(layout: TrellisLayout, multiprocessors: int) -> TrellisLaunch:
    """The span with which the programs, one at a time on a multiprocessor, take the shortest time."""
    rows = -(-layout.rows // (WARPS * ROWS))

    def time(span: int) -> int:
        return -(-rows * (layout.tiles // span) // multiprocessors) * (span + OVERHEAD)

    return TrellisLaunch(WARPS, min((span for span in SPANS if layout.span % span == 0), key=time))


def run_trellis(
    x_MI: Tensor,
    packed: PackedLinear,
    pdl: bool,
    launch: TrellisLaunch | None = None,
    out_dtype: torch.dtype | None = None,
    fused: Fused = UNFUSED,
) -> Tensor:
    """Up to 16 tokens by three kernels, or two without rotations; y [M, O] in `out_dtype`, by default that of x."""
    layout = packed.spec.layout
    assert isinstance(layout, TrellisLayout)
    launch = launch or best_launch(layout, multiprocessors(x_MI.device))

    def product(tokens: Tokens, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
        return _product(tokens, packed, bias_O, dtype, pdl, launch)

    return run_rotated_product(x_MI, packed, "tiles", product, out_dtype or x_MI.dtype, pdl, fused)


def _product(
    tokens: Tokens,
    packed: PackedLinear,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    pdl: bool,
    launch: TrellisLaunch,
) -> Tensor:
    """y [M, O] in `dtype`."""
    weight, spec, m = packed.weight, packed.spec, len(tokens.values)
    assert isinstance(weight, PackedTrellis)
    layout = weight.layout
    warps, span = launch.warps, math.gcd(launch.span, layout.span)
    splits, tiles_n = layout.tiles // span, -(-layout.rows // (warps * ROWS))
    partial = tokens.steps.new_empty((splits, layout.rows, m)) if splits > 1 else None
    y_MO = tokens.steps.new_empty((m, layout.rows), dtype=dtype)
    trellis_product_kernel[(tiles_n * splits,)](
        tokens.values, tokens.steps, weight.words, table_of(weight), weight.scales, packed.b_codes, tokens.projection,
        bias_O, segment_numbers(spec, y_MO.device), partial, packed.workspace, y_MO, m, layout.rows,
        layout=layout.compiled, rank=spec.rank, own_rank=spec.own_rank, projection_splits=tokens.projection_splits,
        BLOCK_S=triton.next_power_of_2(max(tokens.projection_splits, 1)), span=span, splits=splits, tiles_n=tiles_n,
        WARPS=warps, BLOCK_M=max(TOKENS_AT_ONCE, triton.next_power_of_2(m)), TOKENS=triton.next_power_of_2(m),
        BLOCK_R=ranks_of_a_split(spec.own_rank, splits), pdl=pdl, num_warps=warps, **launch_options(pdl),
    )  # fmt: skip
    return y_MO


def dequantize_trellis(weight: PackedTrellis, w_OI: Tensor) -> None:
    """Write the weight's values to w_OI."""
    layout = weight.layout
    trellis_dequantize_kernel[layout.padded_rows // ROW_PADDING, layout.tiles](
        weight.words, table_of(weight), weight.scales, w_OI, layout.rows, layout.columns, layout=layout.compiled,
        BLOCK_N=ROW_PADDING, num_warps=4,
    )  # fmt: skip


def table_of(weight: PackedTrellis) -> Tensor | None:
    """The table of the weight's values, on its device; None if they are computed."""
    return None if weight.layout.sums_bytes else lookup_table(weight.layout.compiled, weight.words.device)


def dequantize_byte_sums(weight: PackedTrellis, w_OI: Tensor) -> None:
    """Write the values of a weight of table "bytes" to w_OI."""
    layout = weight.layout
    byte_sums_dequantize_kernel[-(-layout.rows // (ROWS * DEQUANTIZE_WARPS)), layout.tiles](
        weight.words, weight.scales, w_OI, layout.rows, layout.columns, layout=layout.compiled, WARPS=DEQUANTIZE_WARPS,
        num_warps=DEQUANTIZE_WARPS,
    )  # fmt: skip
