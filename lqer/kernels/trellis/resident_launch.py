"""Host side of the product of up to 64 tokens with trellis codes of table "bytes".

Shapes: M tokens, I in_features, O out_features, R rank, S partial sums; P marks padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from lqer.kernels.fusion import UNFUSED, Fused
from lqer.kernels.halves import TOKENS_AT_ONCE
from lqer.kernels.joint import segment_numbers
from lqer.kernels.layout.codes import ROWS
from lqer.kernels.layout.trellis import PackedTrellis, TrellisLayout
from lqer.kernels.packed import PackedLinear
from lqer.kernels.rotations.launch import Kind, Tokens, rotate_inputs, rotate_outputs
from lqer.kernels.runtime import launch_options, multiprocessors
from lqer.kernels.trellis.byte_sums import TOKENS_AT_ONCE as INTEGERS_AT_ONCE
from lqer.kernels.trellis.resident_gemm import resident_product_kernel

# A program has a multiprocessor's registers for itself: 128 for each thread of these.
WARPS, REGISTERS = 16, 128
# Tiles of a warp, whose tokens its registers hold: two of up to 16 tokens, one of 32.
TILES, TOKENS_OF_TILES, MOST_TOKENS = 2, 16, 32
# Bytes of shared memory for the sums of warps.
ROOM = 32 << 10
# Row groups of a joint linear that are sure to belong to one segment.
GROUPS_OF_SEGMENT = 4
# Ranks that a program adds at once: with more, Triton's shared memory and ours would exceed 48 KB.
MOST_RANKS = 64
# What a program takes besides its row groups, in tiles of a warp.
OVERHEAD = 4


@dataclass(frozen=True)
class ResidentLaunch:
    tiles: int  # of a warp
    splits: int  # programs along the columns
    programs: int  # along the rows


@lru_cache
def resident_launch(layout: TrellisLayout, tokens: int, multiprocessors: int) -> ResidentLaunch:
    """The launch with which a multiprocessor has least to do."""
    groups = -(-layout.rows // ROWS)
    most = TILES if block_of(tokens) <= TOKENS_OF_TILES else 1
    launches = []
    for tiles in range(1, min(most, layout.tiles) + 1):
        splits = -(-layout.tiles // (tiles * WARPS))
        programs = min(groups, max(1, multiprocessors // splits))
        waves = -(-splits * programs // multiprocessors)
        time = waves * (-(-groups // programs) * tiles + OVERHEAD) + 2 * splits
        launches.append((time, ResidentLaunch(tiles, splits, programs)))
    return min(launches, key=lambda launch: launch[0])[1]


def block_of(tokens: int) -> int:
    """Tokens of a program."""
    if tokens <= INTEGERS_AT_ONCE:
        return triton.next_power_of_2(tokens)
    return min(max(TOKENS_AT_ONCE, triton.next_power_of_2(tokens)), MOST_TOKENS)


def run_resident(
    x_MI: Tensor,
    packed: PackedLinear,
    pdl: bool,
    launch: ResidentLaunch | None = None,
    out_dtype: torch.dtype | None = None,
    fused: Fused = UNFUSED,
) -> Tensor:
    """Up to 64 tokens by three kernels, or two and what adds their sums without rotations.

    y [M, O] in `out_dtype`, by default that of x.
    """
    m, layout, dtype = len(x_MI), packed.spec.layout, out_dtype or x_MI.dtype
    assert isinstance(layout, TrellisLayout)
    launch = launch or resident_launch(layout, m, multiprocessors(x_MI.device))
    kind: Kind = "bytes" if m <= INTEGERS_AT_ONCE else "halves"
    tokens = rotate_inputs(x_MI, packed, kind, pdl, -(-m // block_of(m)) * block_of(m), fused)
    y_SMO = _product(tokens, packed, m, pdl, launch)
    if packed.input_signs_I is None:
        y_MO = y_SMO.sum(0)
        return (y_MO if packed.bias_O is None else y_MO + packed.bias_O).to(dtype)
    return rotate_outputs(y_SMO, packed, dtype, pdl, fused.residual_MO)


def _product(tokens: Tokens, packed: PackedLinear, m: int, pdl: bool, launch: ResidentLaunch) -> Tensor:
    """Partial sums of y, float32 [splits, M, O]."""
    weight, spec, block_m = packed.weight, packed.spec, block_of(m)
    assert isinstance(weight, PackedTrellis)
    layout = weight.layout
    at_once = ROOM // (4 * WARPS * ROWS * block_m)
    buffers = min(2, at_once)
    at_once //= buffers
    groups = -(-layout.rows // ROWS)
    per_program = -(-groups // launch.programs)
    if spec.rank:
        at_once = min(at_once, GROUPS_OF_SEGMENT)
        per_program = -(-per_program // at_once) * at_once
    programs = -(-groups // per_program)
    y_SMO = tokens.steps.new_empty((launch.splits, m, layout.rows), dtype=torch.float32)
    resident_product_kernel[programs * launch.splits, -(-m // block_m)](
        tokens.values, tokens.steps, weight.words, weight.scales, packed.b_codes, tokens.projection,
        segment_numbers(spec, y_SMO.device), y_SMO, m, layout.rows, programs, per_program,
        layout=layout.compiled, rank=spec.rank, own_rank=spec.own_rank, projection_splits=tokens.projection_splits,
        BLOCK_S=triton.next_power_of_2(max(tokens.projection_splits, 1)),
        BLOCK_R=min(triton.next_power_of_2(max(spec.own_rank, 16)), MOST_RANKS), integers=m <= INTEGERS_AT_ONCE,
        span=-(-layout.tiles // launch.splits), tiles=launch.tiles, at_once=at_once, buffers=buffers, warps=WARPS,
        BLOCK_M=block_m, pdl=pdl, num_warps=WARPS, maxnreg=REGISTERS, **launch_options(pdl),
    )  # fmt: skip
    return y_SMO
