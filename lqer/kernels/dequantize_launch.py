"""Host side of the regime for many tokens: the weight is dequantized once, and a library multiplies.

Shapes: M tokens, I in_features, O out_features, R rank; P marks padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import triton
from torch import Tensor

from lqer.kernels.activations import project_kernel
from lqer.kernels.codebooks.launch import dequantize_codebook
from lqer.kernels.dequantize import dequantize_kernel, group_dequantize_kernel, low_rank_kernel
from lqer.kernels.input_launch import NATURAL_ORDER, dense_rows, order_of, rank_block, round_activations
from lqer.kernels.joint import segment_numbers
from lqer.kernels.lattice.launch import dequantize_lattice
from lqer.kernels.layout.codebook import PackedCodebook
from lqer.kernels.layout.codes import ROW_PADDING, ROWS
from lqer.kernels.layout.groups import PackedGroups
from lqer.kernels.layout.lattice import PackedLattice
from lqer.kernels.layout.trellis import PackedTrellis
from lqer.kernels.packed import PROJECTION_COUNTERS, AnyWeight, PackedLinear
from lqer.kernels.runtime import INTERPRETED, launch_options
from lqer.kernels.trellis.launch import dequantize_byte_sums, dequantize_trellis

PROJECTED_ROWS, PROJECTED_COLUMNS, PROJECTED_WARPS, PROJECTED_STAGES = 16, 256, 4, 1
PROJECTING_PROGRAMS = 2 * PROJECTION_COUNTERS  # a split of K needs a counter; about four programs a multiprocessor
LOW_RANK_ROWS, LOW_RANK_COLUMNS, LOW_RANK_WARPS = 128, 64, 8


def run_dequantized(x_MI: Tensor, packed: PackedLinear) -> Tensor:
    """y [M, O]: the low-rank branch on a second stream while the weight is dequantized, then W x added by a library.

    Where a library can compute the branch as well, it does: of many tokens its products are faster.
    """
    x_MI = dense_rows(x_MI)
    if packed.a_codes is None:
        x_MI = round_activations(x_MI, packed.spec, ordered=False)
        return torch.nn.functional.linear(x_MI, dequantize_weight(packed.weight, x_MI.dtype), packed.bias_O)
    if has_plain_branch(packed):
        y_MO = plain_branch(x_MI, packed)
        return y_MO.addmm_(x_MI, dequantize_weight(packed.weight, x_MI.dtype).T)
    rounded_MI, projection_MR, y_MO = low_rank_buffers(x_MI, packed)
    with _on_side_stream(x_MI) as join:
        project(x_MI, packed, rounded_MI, projection_MR)
        write_low_rank(projection_MR, packed, y_MO)
    w_OI = dequantize_weight(packed.weight, x_MI.dtype)
    join()
    return y_MO.addmm_(rounded_MI, w_OI.T)


def has_plain_branch(packed: PackedLinear) -> bool:
    """Whether x A B is two products of matrices: nothing is rounded, and the factors are values."""
    return not packed.spec.rounding.bits and packed.a_exponents is None and packed.b_exponents is None


def plain_branch(x_MI: Tensor, packed: PackedLinear) -> Tensor:
    """x A B + b [M, O] by a library, for a packed linear that `has_plain_branch`."""
    a_RI, b_RO, bias_O, spec = packed.a_codes, packed.b_codes, packed.bias_O, packed.spec
    assert a_RI is not None
    assert b_RO is not None
    projection_MR = x_MI @ a_RI[:, : x_MI.shape[1]].T
    y_MO = x_MI.new_empty(len(x_MI), spec.layout.rows)
    # Of linears side by side, each to where the next one starts: in between B is zero.
    starts = [segment.start for segment in spec.segments] or [0]
    for index, (start, stop) in enumerate(zip(starts, [*starts[1:], spec.layout.rows], strict=True)):
        own_MR = projection_MR[:, index * spec.own_rank : (index + 1) * spec.own_rank]
        torch.mm(own_MR, b_RO[:, start:stop], out=y_MO[:, start:stop])
    return y_MO if bias_O is None else y_MO.add_(bias_O)


@contextmanager
def _on_side_stream(x: Tensor) -> Iterator[Callable[[], None]]:
    """Run the body's kernels concurrently with later ones, until the yielded function is called.

    Tensors that are used after the body must be allocated before it, on the caller's stream.
    """
    if not x.is_cuda:
        yield lambda: None
        return
    main, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield lambda: main.wait_stream(side)


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """High priority: its kernels have few programs, and those of the main stream fill the rest of the GPU."""
    return torch.cuda.Stream(device, priority=-1)


def low_rank_buffers(x_MI: Tensor, packed: PackedLinear) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of `project` and `write_low_rank`: x rounded (x itself if it is not), Q(x A) [M, RP] and y [M, O]."""
    m, spec = len(x_MI), packed.spec
    rounded_MI = x_MI.new_empty(x_MI.shape) if spec.rounding.bits else x_MI
    return rounded_MI, x_MI.new_empty(m, spec.rank), x_MI.new_empty(m, spec.layout.rows)


def project(
    x_MI: Tensor,
    packed: PackedLinear,
    rounded_MI: Tensor,
    projection_MR: Tensor,
    ordered: bool = False,
    pdl: bool = False,
) -> None:
    """Round x to the layer's activation format, if it has one, into rounded_MI; Q(x_q A) into projection_MR.

    ordered: rounded_MI is [M, IP], in the order of decoded columns.
    """
    spec, block_r, (m, k) = packed.spec, rank_block(packed.spec.own_rank), x_MI.shape
    tiles_m, rank_blocks = -(-m // PROJECTED_ROWS), spec.rank // block_r
    steps, wanted = -(-k // PROJECTED_COLUMNS), PROJECTING_PROGRAMS // (tiles_m * rank_blocks)
    # A power of two, because every different number is compiled anew.
    steps_of_split = triton.next_power_of_2(-(-steps // max(wanted, 1)))
    splits = -(-steps // steps_of_split)
    partial = x_MI.new_empty((splits, m, spec.rank), dtype=torch.float32) if splits > 1 else None
    project_kernel[splits, tiles_m, rank_blocks](
        x_MI, packed.a_codes, packed.a_exponents, rounded_MI, partial, projection_MR, packed.workspace, m, k,
        x_MI.stride(0), rank=spec.rank, padded_columns=spec.layout.padded_columns, splits=splits,
        SPLIT_K=steps_of_split * PROJECTED_COLUMNS, rounding=spec.rounding, a_block=spec.a_block,
        BLOCK_M=PROJECTED_ROWS, BLOCK_K=PROJECTED_COLUMNS, BLOCK_R=block_r, stages=PROJECTED_STAGES,
        **(order_of(spec) if ordered else NATURAL_ORDER), pdl=pdl, num_warps=PROJECTED_WARPS, **launch_options(pdl),
    )  # fmt: skip


def write_low_rank(projection_MR: Tensor, packed: PackedLinear, y_MO: Tensor, pdl: bool = False) -> None:
    """y = Q(Q(x A) B) + b; projection_MR: Q(x A)."""
    spec, (m, n) = packed.spec, y_MO.shape
    low_rank_kernel[-(-n // LOW_RANK_COLUMNS), -(-m // LOW_RANK_ROWS)](
        y_MO, projection_MR, packed.b_codes, packed.b_exponents, packed.bias_O,
        segment_numbers(spec, y_MO.device), m, n, rank=spec.rank, own_rank=spec.own_rank, b_block=spec.b_block,
        rounding=spec.rounding, BLOCK_N=LOW_RANK_COLUMNS, BLOCK_M=LOW_RANK_ROWS,
        BLOCK_R=rank_block(spec.own_rank), pdl=pdl, num_warps=LOW_RANK_WARPS, **launch_options(pdl),
    )  # fmt: skip


def dequantize_weight(weight: AnyWeight, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype` [O, I]."""
    layout = weight.layout
    w_OI = torch.empty(layout.rows, layout.columns, dtype=dtype, device=weight.words.device)
    if isinstance(weight, PackedCodebook):
        dequantize_codebook(weight, w_OI)
    elif isinstance(weight, PackedLattice):
        dequantize_lattice(weight, w_OI)
    elif isinstance(weight, PackedTrellis):
        # Triton's interpreter runs no PTX.
        computed = weight.layout.sums_bytes and not INTERPRETED
        (dequantize_byte_sums if computed else dequantize_trellis)(weight, w_OI)
    elif isinstance(weight, PackedGroups):
        group_dequantize_kernel[weight.layout.padded_rows // ROWS, weight.layout.strips](
            weight.words, weight.scales, weight.zeros, w_OI, layout.rows, layout.columns,
            layout=weight.layout.compiled, BLOCK_N=ROWS, num_warps=4,
        )  # fmt: skip
    else:
        dequantize_kernel[weight.layout.padded_rows // ROW_PADDING, weight.layout.tiles](
            *weight.parts, w_OI, layout.rows, layout.columns, layout=weight.layout.compiled,
            BLOCK_N=ROW_PADDING, num_warps=4,
        )  # fmt: skip
    return w_OI
