"""Host side of the kernels for lattice codes and for linears in a randomized Hadamard basis.

Shapes: M tokens, N out_features, K in_features, R rank; P marks padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lqer.transforms.hadamard import small_factor, small_order

from .hadamard import prepare_tokens_kernel, restore_tokens_kernel
from .lattice import TILE_K, LatticeLayout, PackedLattice
from .lattice_gemm import lattice_digits_kernel, lattice_product_kernel

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
LARGEST_BLOCK = 128  # of a transform's outputs, for one program
TRANSFORM_WARPS = 8
RANKS_AT_ONCE = 64


@dataclass(frozen=True)
class LatticeLaunch:
    block_n: int
    warps: int
    span: int  # tiles of 128 columns, for one program; at most those of the layout
    digits: bool = True


LAUNCH = LatticeLaunch(64, 4, 16)


@dataclass(frozen=True)
class Transform:
    """H of one length as blocks (hadamard.py): outer (A, A) float32, the size of a block, and 1 / sqrt of it."""

    outer: Tensor
    block: int

    @property
    def factor(self) -> float:
        return 1 / math.sqrt(self.block)


@lru_cache
def transform(length: int, inverse: bool, device: torch.device) -> Transform:
    """Kept on the device: in a CUDA graph nothing may be copied there."""
    small = small_order(length)
    power = length // small
    block = min(power, LARGEST_BLOCK)
    outer = small_factor(small)
    while power > block:
        # H_2n = H_2 ⊗ H_n: the inner factor of the outer one.
        outer = torch.kron(outer, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)) / math.sqrt(2)
        power //= 2
    outer = outer.T if inverse else outer
    return Transform(outer.to(torch.float32).contiguous().to(device), block)


def run_lattice(
    x_MK: Tensor,
    weight: PackedLattice,
    a_values: Tensor | None,
    b_values: Tensor | None,
    rank: int,
    bias_N: Tensor | None,
    signs: tuple[Tensor, Tensor] | None,
    headroom: float,
    finished: Tensor,
    chained: bool,
    launch: LatticeLaunch = LAUNCH,
) -> Tensor:
    layout = weight.layout
    m, n, k = len(x_MK), layout.rows, layout.columns
    padded = layout.padded_columns
    into = transform(k, False, x_MK.device) if signs else None
    block = into.block if into else TILE_K
    blocks = k // block if into else padded // block
    steps = sums = None
    if launch.digits and block < TILE_K:
        raise NotImplementedError
    if launch.digits:
        x_out = x_MK.new_empty((m, 4, padded), dtype=torch.int8)
        steps = x_MK.new_empty((m, 4, layout.tiles), dtype=torch.float32)
        sums = x_MK.new_empty((m, 4, layout.tiles), dtype=torch.int32)
        if blocks * block != padded:
            x_out.zero_(), steps.zero_(), sums.zero_()
    else:
        x_out = (x_MK.new_empty if blocks * block == padded else x_MK.new_zeros)((m, padded))
    projection = x_MK.new_empty((blocks, m, rank), dtype=torch.float32) if rank else None
    options = {"launch_pdl": True} if chained else {}
    prepare_tokens_kernel[blocks, m](
        x_MK, signs[0] if signs else None, into.outer if into else None, a_values, x_out, steps, sums, projection, m, k,
        x_MK.stride(0), rank=rank, padded=padded, A=blocks, BLOCK_A=triton.next_power_of_2(blocks), B=block,
        BLOCK_R=min(rank, RANKS_AT_ONCE), factor=into.factor / headroom if into else 1.0, tile_k=TILE_K, digits=launch.digits,
        chained=chained, num_warps=TRANSFORM_WARPS, **options,
    )  # fmt: skip
    span = math.gcd(launch.span, layout.span)
    splits = layout.tiles // span
    block_m = 8 if m <= 8 else 16
    tokens = min(block_m, triton.next_power_of_2(m))
    tiles_n, tiles_m = -(-layout.padded_rows // launch.block_n), -(-m // block_m)
    partial = x_MK.new_empty((splits, n, m), dtype=torch.float32) if splits > 1 else None
    block_r = min(rank, max(16, rank // splits)) if rank else 16
    y_MN = x_MK.new_empty(m, n, dtype=torch.float32 if signs else None)
    shared = dict(
        rank=rank, slabs=blocks, BLOCK_S=triton.next_power_of_2(blocks), tiles=layout.tiles, span=span, splits=splits,
        tiles_n=tiles_n, BLOCK_N=launch.block_n, TOKENS=tokens, BLOCK_R=block_r, chained=chained,
        num_warps=launch.warps, **options,
    )  # fmt: skip
    grid = (tiles_n * splits * tiles_m,)
    if launch.digits:
        lattice_digits_kernel[grid](
            x_out, steps, sums, weight.units, weight.table, weight.scales, b_values, projection,
            None if signs else bias_N, partial, finished, y_MN, m, n, dtype=TYPES[x_MK.dtype],
            COLUMNS=max(8, 4 * tokens), **shared,
        )  # fmt: skip
    else:
        lattice_product_kernel[grid](
            x_out, weight.units, weight.table, weight.scales, b_values, projection, None if signs else bias_N, partial,
            finished, y_MN, m, n, BLOCK_M=block_m, **shared,
        )  # fmt: skip
    if not signs:
        return y_MN
    back = transform(n, True, x_MK.device)
    y_out = x_MK.new_empty(m, n)
    blocks = n // back.block
    restore_tokens_kernel[blocks, m](
        y_MN, signs[1], back.outer, bias_N, y_out, m, A=blocks, BLOCK_A=triton.next_power_of_2(blocks), B=back.block,
        factor=back.factor * headroom, chained=chained, num_warps=TRANSFORM_WARPS, **options,
    )  # fmt: skip
    return y_out
