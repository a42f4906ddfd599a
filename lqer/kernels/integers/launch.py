"""Host side of the kernels on integer codes ("mxint" and "int"): one token by gemv.py, a few by gemm.py.

Shapes: M tokens, I in_features, O out_features, R rank; P marks padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from lqer.kernels import runtime
from lqer.kernels.input_launch import dense_rows, rank_block, round_activations
from lqer.kernels.integers.gemm import gemm_kernel
from lqer.kernels.integers.gemv import gemv_kernel, prepare_vector_kernel
from lqer.kernels.integers.groups_wide import BITS
from lqer.kernels.joint import segment_numbers
from lqer.kernels.layout.codes import ROW_PADDING, ROWS, Layout, PackedWeight
from lqer.kernels.layout.groups import GroupLayout
from lqer.kernels.packed import PROJECTION_COUNTERS, TOKEN_TILES, PackedLinear
from lqer.kernels.spec import Spec
from lqer.kernels.tuning import GemmLaunch, GemvLaunch

PROJECTION_COLUMNS = 256  # of x, for one program
VECTOR_TILES = 4  # of x's codes, for one program
VECTOR_COLUMNS = 16384  # of x and A, at once
VECTOR_WARPS = 8
SMALLEST_BLOCK_M = 16
GEMV_MAX_RANK = 64  # a program keeps a row of x A and its columns of B in registers


def fits_gemv(packed: PackedLinear) -> bool:
    """Whether the integer kernel can run this layer for one token."""
    spec, layout = packed.spec, packed.spec.layout
    assert isinstance(layout, Layout)
    weight_fits = layout.exponents and layout.bits == 4 and layout.block in (16, 32)
    return weight_fits and spec.rounding.bits > 0 and spec.own_rank <= GEMV_MAX_RANK


def fits_gemm(packed: PackedLinear, tokens: int, launch: GemmLaunch) -> bool:
    """Whether the layer's workspace has enough counters for this number of tokens, and programs round whole blocks."""
    token_tiles = -(-tokens // launch.block_m)
    if launch.block_n % rows_together(packed):
        return False
    return token_tiles <= TOKEN_TILES and low_rank_counters(packed.spec) * token_tiles <= PROJECTION_COUNTERS


def rows_together(packed: PackedLinear) -> int:
    """Rows whose low-rank outputs are rounded in one block."""
    return max(1, packed.spec.rounding.block) if packed.spec.rank and packed.spec.rounding.bits else 1


def low_rank_counters(spec: Spec) -> int:
    """Counters that the low-rank branch needs for a tile of tokens (low_rank.py)."""
    return 1 + spec.rank // rank_block(spec.own_rank) if spec.rank else 0


def run_gemv(
    x_1I: Tensor,
    packed: PackedLinear,
    launch: GemvLaunch,
    out_dtype: torch.dtype | None = None,
    residual_1O: Tensor | None = None,
) -> Tensor:
    """One token, in integers; y [1, O], with the residual, in `out_dtype`, by default that of x."""
    spec, weight = packed.spec, packed.weight
    assert isinstance(weight, PackedWeight)
    layout = weight.layout
    x_1I = dense_rows(x_1I)
    padded = layout.padded_columns
    # One buffer: an allocation from Python takes as long as a small kernel.
    vector = x_1I.new_empty(padded // 2 + spec.rank, dtype=torch.int32)
    pdl = runtime.supports_pdl(x_1I)
    block_k = min(VECTOR_COLUMNS, triton.next_power_of_2(layout.columns))
    prepare_vector_kernel[(spec.rank + -(-layout.tiles // VECTOR_TILES),)](
        x_1I, packed.a_codes, packed.a_exponents, vector, layout.columns, rank=spec.rank, tiles=layout.tiles,
        rounding=spec.rounding, a_block=spec.a_block, TILES=VECTOR_TILES, BLOCK_K=block_k, pdl=pdl,
        num_warps=max(VECTOR_WARPS, block_k // 1024), **runtime.launch_options(pdl),
    )  # fmt: skip
    y_1O = x_1I.new_empty(1, layout.rows, dtype=out_dtype)
    gemv_kernel[(-(-layout.rows // launch.block_n),)](
        weight.words, weight.scales, packed.bias_O, vector, packed.b_codes, packed.b_exponents,
        segment_numbers(spec, x_1I.device), residual_1O, y_1O, layout.rows, rank=spec.own_rank, tiles=layout.tiles,
        per_tile=layout.scales_per_tile, mid_rise=layout.mid_rise, rounding=spec.rounding, b_block=spec.b_block,
        BLOCK_N=launch.block_n, BLOCK_T=launch.block_t, pdl=pdl, num_warps=launch.warps, **runtime.launch_options(pdl),
    )  # fmt: skip
    return y_1O


def run_gemm(
    x_MI: Tensor,
    packed: PackedLinear,
    launch: GemmLaunch,
    out_dtype: torch.dtype | None = None,
    residual_MO: Tensor | None = None,
) -> Tensor:
    """A few tokens, weights decoded in registers; y [M, O], with the residual, in `out_dtype`, by default that of x."""
    spec, layout = packed.spec, packed.spec.layout
    assert isinstance(layout, Layout)
    given = dense_rows(x_MI)
    # Kernel order saves a pass through registers for every row of x, but serializes the tensor cores a little.
    ordered = launch.block_m > SMALLEST_BLOCK_M and spec.rounding.bits > 0
    if layout.padded_rows % launch.block_n:
        launch = replace(launch, block_n=ROW_PADDING)
    x_MI = round_activations(given, packed.spec, ordered)
    return _product(
        x_MI, given, packed, layout, launch, min(launch.splits, layout.tiles), ordered, out_dtype, residual_MO
    )


def run_groups(
    x_MI: Tensor,
    packed: PackedLinear,
    launch: GemmLaunch,
    out_dtype: torch.dtype | None = None,
    residual_MO: Tensor | None = None,
) -> Tensor:
    """The same for integer groups; a warp computes 16, 32 or 64 rows, or several share 16 rows and split the strips."""
    layout = packed.spec.layout
    assert isinstance(layout, GroupLayout)
    assert launch.block_n % ROWS == 0
    given = whole_strips(dense_rows(x_MI), layout)
    x_MI = whole_strips(round_activations(given, packed.spec, ordered=False), layout)
    return _product(
        x_MI, given, packed, layout, launch, min(launch.splits, layout.strips), False, out_dtype, residual_MO
    )


def run_wide(
    x_MI: Tensor,
    packed: PackedLinear,
    launch: GemmLaunch,
    out_dtype: torch.dtype | None = None,
    residual_MO: Tensor | None = None,
) -> Tensor:
    """17 tokens and more with four-bit groups, decoded as the tensor cores' operand; like `run_gemm`."""
    layout = packed.spec.layout
    assert isinstance(layout, GroupLayout)
    assert layout.bits == BITS
    given = dense_rows(x_MI)
    x_MI = round_activations(given, packed.spec, ordered=True)
    return _product(
        x_MI, given, packed, layout, launch, min(launch.splits, layout.strips), True, out_dtype, residual_MO
    )


def whole_strips(x_MI: Tensor, layout: GroupLayout) -> Tensor:
    """x, copied if its rows do not end with a strip or are not aligned to the 16 bytes that a thread reads at once."""
    if x_MI.shape[1] == layout.padded_columns and x_MI.data_ptr() % 16 == 0 and x_MI.stride(0) % 8 == 0:
        return x_MI
    return torch.nn.functional.pad(x_MI, (0, layout.padded_columns - x_MI.shape[1])).clone()


def _product(
    x_MI: Tensor,
    given: Tensor,
    packed: PackedLinear,
    layout: Layout | GroupLayout,
    launch: GemmLaunch,
    splits: int,
    ordered: bool,
    out_dtype: torch.dtype | None,
    residual_MO: Tensor | None,
) -> Tensor:
    """y [M, O] of x as the kernel reads it, and of x before it was rounded."""
    spec, m, n = packed.spec, len(given), layout.rows
    y_MO = given.new_empty(m, n, dtype=out_dtype)
    tiles_n, tiles_m = -(-layout.padded_rows // launch.block_n), -(-m // launch.block_m)
    # The low-rank branch is one more partial sum of every output tile.
    parts = splits + (1 if spec.rank else 0)
    of_tiles = (parts, tiles_n * tiles_m, launch.block_n * launch.block_m)
    partial = given.new_empty(of_tiles, dtype=torch.float32) if parts > 1 else None
    projection = _projection(given, packed)
    producers = projection.splits * projection.rank_blocks * tiles_m
    pdl = starts_early(spec, ordered) and runtime.supports_pdl(given)
    gemm_kernel[(producers + tiles_n * parts * tiles_m,)](
        x_MI, given, *packed.weight.parts, packed.bias_O, packed.a_codes, packed.a_exponents,
        packed.b_codes, packed.b_exponents, partial, packed.workspace[PROJECTION_COUNTERS:], projection.partial,
        projection.result, packed.workspace, segment_numbers(spec, given.device), residual_MO, y_MO, m, n,
        layout.columns, x_MI.stride(0), given.stride(0), rank=spec.rank, own_rank=spec.own_rank, layout=layout.compiled,
        ordered=ordered, rounding=spec.rounding, a_block=spec.a_block, b_block=spec.b_block,
        padded_columns=layout.padded_columns, projection_splits=projection.splits, SPLIT_K=PROJECTION_COLUMNS,
        tiles_n=tiles_n, BLOCK_N=launch.block_n, BLOCK_M=launch.block_m, BLOCK_R=rank_block(spec.own_rank),
        splits=splits, stages=launch.stages, pdl=pdl, num_warps=launch.warps, **register_limit(launch, layout),
        **runtime.launch_options(pdl),
    )  # fmt: skip
    return y_MO


def starts_early(spec: Spec, ordered: bool) -> bool:
    """Whether the product is launched with PDL, so that it copies its first codes while the kernel before it ends.

    Not after a kernel that rounds x, which lets programs start when they land unevenly on the multiprocessors, unless
    it is the small one that also orders x; and not with a branch, whose programs wait for others of the same kernel.
    """
    return isinstance(spec.layout, GroupLayout) and not spec.rank and (ordered or not spec.rounding.bits)


def register_limit(launch: GemmLaunch, layout: Layout | GroupLayout) -> dict[str, int]:
    """Registers that let four programs of four warps share a multiprocessor, if their accumulators are small enough.

    Integer groups need more for the tokens of two parts of a strip: three programs are faster than spilled registers.
    """
    small = (launch.block_n, launch.block_m, launch.warps) == (128, SMALLEST_BLOCK_M, 4)
    limit = 168 if isinstance(layout, GroupLayout) else 128
    return {"maxnreg": limit} if small and not runtime.INTERPRETED else {}


@dataclass(frozen=True)
class _Projection:
    """Buffers of Q(x A): partial [splits, M, RP] float32 and result [M, RP]; none at rank 0."""

    splits: int
    rank_blocks: int
    partial: Tensor | None
    result: Tensor | None


def _projection(x_MI: Tensor, packed: PackedLinear) -> _Projection:
    spec, m = packed.spec, len(x_MI)
    if not spec.rank:
        return _Projection(0, 0, None, None)
    splits = -(-spec.layout.columns // PROJECTION_COLUMNS)
    partial = x_MI.new_empty((splits, m, spec.rank), dtype=torch.float32)
    return _Projection(splits, spec.rank // rank_block(spec.own_rank), partial, x_MI.new_empty(m, spec.rank))
