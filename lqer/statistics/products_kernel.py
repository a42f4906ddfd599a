"""Sums of products of half-precision inputs on a GPU, about as exact as float32 can be, then added to float64.

    S_ij = S_ij + Σ_n x_ni y_nj            for i >= j alone where y = x

Products of two bfloat16 or float16 numbers are exact in float32, but the tensor cores of Hopper cut off what they add
up instead of rounding it, so that a long sum of squares ends too small: by 2e-6 of itself after 512 tokens. Here they
add up PROMOTED tokens at a time, from zero; these sums are added to each other in float32, rounded to nearest, for at
most MOST_TOKENS tokens, and their sum to float64. In PyTorch the last step alone, once per 512 tokens, would take
several times as long as the products. It imports triton: only for tensors on a GPU, or in Triton's interpreter.

Shapes: N tokens, I in_features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens that tensor cores add up.
PROMOTED = 128
MOST_TOKENS = 4096
TILE = 128
# Rows of tiles that programs running at the same time share: so they read few different columns.
ROWS_TOGETHER = 8


def add_half_products(sum_II: Tensor, x_NI: Tensor, y_NI: Tensor, lower: bool) -> None:
    """Add Σ x yᵀ to a contiguous float64 sum; if `lower`, only to whole tiles on and below the diagonal.

    x_NI, y_NI: bfloat16 or float16, both the same, rows contiguous.
    """
    features = len(sum_II)
    tiles = triton.cdiv(features, TILE)
    # Triton launches on the current GPU, wherever the tensors are.
    with torch.cuda.device_of(sum_II):
        for first in range(0, len(x_NI), MOST_TOKENS):
            x, y = x_NI[first : first + MOST_TOKENS], y_NI[first : first + MOST_TOKENS]
            products_kernel[(tiles * tiles,)](
                x, y, sum_II, len(x), features, x.stride(0), y.stride(0), 0, LOWER=lower, TILE_C=TILE,
                PROMOTED_C=PROMOTED, ROWS_C=ROWS_TOGETHER, num_warps=8, num_stages=3,
            )  # fmt: skip


@triton.jit
def products_kernel(
    x, y, sums, tokens, features, x_stride, y_stride, zero,
    LOWER: tl.constexpr, TILE_C: tl.constexpr, PROMOTED_C: tl.constexpr, ROWS_C: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(features, TILE_C)
    first_row = tl.program_id(0) // (ROWS_C * tiles) * ROWS_C
    within = tl.program_id(0) % (ROWS_C * tiles)
    rows = tl.minimum(tiles - first_row, ROWS_C)
    row = first_row + within % rows
    column = within // rows
    if LOWER and column > row:
        return
    i = row * TILE_C + tl.arange(0, TILE_C)
    j = column * TILE_C + tl.arange(0, TILE_C)
    n = tl.arange(0, PROMOTED_C)
    in_i, in_j = (i < features)[None, :], (j < features)[None, :]
    total = tl.zeros((TILE_C, TILE_C), tl.float32)
    # A zero that is not known: the compiler would turn "total + product from zero" into one product from the total.
    start = tl.full((TILE_C, TILE_C), zero, tl.float32)
    for first in range(0, tokens, PROMOTED_C):
        token = (first + n)[:, None]
        x_tile = tl.load(x + token * x_stride + i[None, :], mask=(token < tokens) & in_i, other=0.0)
        y_tile = tl.load(y + token * y_stride + j[None, :], mask=(token < tokens) & in_j, other=0.0)
        total += tl.dot(tl.trans(x_tile), y_tile, start)
    at = sums + i[:, None].to(tl.int64) * features + j[None, :]
    inside = (i < features)[:, None] & in_j
    tl.store(at, tl.load(at, mask=inside, other=0.0) + total.to(tl.float64), mask=inside)
