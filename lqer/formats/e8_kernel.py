"""The search of `e8_search.py` on a GPU: nearest E8P points without a matrix of distances to all of them.

Comparing with all 65536 points moves half a megabyte for every vector. Here a program holds some vectors in registers
and finds the best member of each class of rows as `e8_search.py` describes it, in a few hundred operations. It imports
triton: only for tensors on a GPU, or in Triton's interpreter.

Shapes: N vectors of a program, 8 coordinates, K rows, V vectors, P points.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lqer.formats.e8 import DIMENSION, ROWS, absolute_rows, e8_one_bit_points

# Vectors of a program, which is one warp: a lane holds a vector.
VECTORS = 32
DIMENSION_C = tl.constexpr(DIMENSION)
ONE_BIT_POINTS_C = tl.constexpr(256)
ROWS_C = tl.constexpr(ROWS)
# Rows of |a|² = 12, which are looked at one by one; they are the last ones.
NORM_12 = 29
NORM_12_C = tl.constexpr(NORM_12)
PATTERNS = 3**DIMENSION
# Where the tables of `tables` lie in it.
DIGITS_AT, ROW_AT = tl.constexpr(DIMENSION), tl.constexpr(DIMENSION + ROWS * DIMENSION)


@lru_cache
def tables(device: torch.device) -> Tensor:
    """int32: the powers of 3 [8], the digits of all rows [256, 8], and the row with each pattern of digits [3^8]."""
    digits_K8 = torch.tensor(absolute_rows(), dtype=torch.int32)
    powers_8 = 3 ** torch.arange(DIMENSION)
    row_of_pattern = torch.zeros(PATTERNS, dtype=torch.int32)
    row_of_pattern[(digits_K8 * powers_8).sum(1)] = torch.arange(ROWS, dtype=torch.int32)
    return torch.cat([powers_8.to(torch.int32), digits_K8.flatten(), row_of_pattern]).to(device)


@lru_cache
def one_bit_tables(device: torch.device) -> Tensor:
    """float32 [256, 9]: the points of the E8 1-bit codebook, and |p|² / 2 of each."""
    points_P8 = e8_one_bit_points(device)
    return torch.cat([points_P8, points_P8.square().sum(1, keepdim=True) / 2], dim=1).contiguous()


def nearest(x_V8: Tensor) -> Tensor:
    """int64 codes [V] of the nearest E8P points of float32 vectors [V, 8]; NaN is read as 0."""
    x_V8 = x_V8.contiguous()
    codes_V = torch.empty(len(x_V8), dtype=torch.int64, device=x_V8.device)
    if len(x_V8):
        nearest_e8p_kernel[(triton.cdiv(len(x_V8), VECTORS),)](
            x_V8, codes_V, tables(x_V8.device), len(x_V8), VECTORS_C=VECTORS, num_warps=1
        )
    return codes_V


@triton.jit
def nearest_e8p_kernel(x, codes, table, vectors, VECTORS_C: tl.constexpr):
    v = tl.program_id(0).to(tl.int64) * VECTORS_C + tl.arange(0, VECTORS_C)
    inside = v < vectors
    d = tl.arange(0, DIMENSION_C)
    x_8N = tl.load(x + v[None, :] * DIMENSION_C + d[:, None], mask=inside[None, :], other=0.0)
    code_N, _ = nearest_e8p(x_8N, table)
    tl.store(codes + v, code_N.to(tl.int64), mask=inside)


@triton.jit
def nearest_e8p(x_8N, table):
    """Codes, int32 [N], and points [8, N] of float32 vectors [8, N]; NaN is read as 0. table: of `tables`."""
    d_81 = tl.arange(0, DIMENSION_C)[:, None]
    x_8N = tl.where(x_8N == x_8N, x_8N, 0.0)
    score_N, rank_8N, fives_N, nonzero_N, row_N = _best_row(x_8N - 0.25, table)
    minus_score_N, minus_rank_8N, minus_fives_N, minus_nonzero_N, minus_row_N = _best_row(x_8N + 0.25, table)
    # |x - point|² = |x|² - δ/2 sum(x) + 1/2 - score: the larger of score + δ/2 sum(x) is nearer.
    minus_N = minus_score_N > score_N + tl.sum(x_8N, axis=0)
    rank_8N = tl.where(minus_N[None, :], minus_rank_8N, rank_8N)
    fives_N = tl.where(minus_N, minus_fives_N, fives_N)
    nonzero_N = tl.where(minus_N, minus_nonzero_N, nonzero_N)
    row_N = tl.where(minus_N, minus_row_N, row_N)
    y_8N = x_8N - tl.where(minus_N, -0.25, 0.25)[None, :]

    digits_8N = (rank_8N < fives_N[None, :]).to(tl.int32) + (rank_8N < nonzero_N[None, :]).to(tl.int32)
    of_row_8N = tl.load(table + DIGITS_AT + tl.maximum(row_N, 0)[None, :] * DIMENSION_C + d_81)
    digits_8N = tl.where(row_N[None, :] < 0, digits_8N, of_row_8N)
    # Where the parity of the signs is wrong, the sign that costs least changes; of equally cheap ones the one that
    # leaves the lowest code: the first negative, else the last positive.
    magnitude_8N, negative_8N = tl.abs(y_8N), (y_8N < 0).to(tl.int32)
    threes_N = tl.sum((digits_8N == 1).to(tl.int32), axis=0)
    wrong_N = (threes_N + tl.sum(negative_8N, axis=0)) & 1
    cost_8N = magnitude_8N * (digits_8N.to(tl.float32) + 0.5)
    preference_8N = tl.where(negative_8N == 1, 2 * DIMENSION_C - 1 - d_81, d_81)
    preference_8N = tl.where(cost_8N == tl.min(cost_8N, axis=0)[None, :], preference_8N, -1)
    is_flipped_8N = preference_8N == tl.max(preference_8N, axis=0)[None, :]
    negative_8N = negative_8N ^ (is_flipped_8N.to(tl.int32) * wrong_N[None, :])

    pattern_N = tl.sum(digits_8N * tl.load(table + d_81), axis=0)
    row_N = tl.load(table + ROW_AT + pattern_N)
    signs_N = tl.sum(negative_8N * (64 >> d_81), axis=0)
    code_N = (minus_N.to(tl.int32) << 15) | (row_N << 7) | signs_N
    point_8N = (digits_8N.to(tl.float32) + 0.5) * (1 - 2 * negative_8N).to(tl.float32)
    return code_N, point_8N + tl.where(minus_N, -0.25, 0.25)[None, :]


@triton.jit
def _best_row(y_8N, table):
    """Best score 2<y, σ·a> - |a|² [N] over the rows, the ranks of |y| [8, N], and which row it is.

    The row is the member of a class, given by how many digits are 2 and how many are not 0, that is sorted as |y| is;
    or the row of |a|² = 12 given last, which is -1 for the others.
    """
    d = tl.arange(0, DIMENSION_C)
    magnitude_8N = tl.abs(y_8N)
    odd_N = tl.sum((y_8N < 0).to(tl.int32), axis=0) & 1
    # The rank is how many are larger. Of equal magnitudes the later coordinate counts as the larger.
    other_88N, one_88N = magnitude_8N[:, None, :], magnitude_8N[None, :, :]
    is_later_881 = d[:, None, None] > d[None, :, None]
    is_larger_88N = (other_88N > one_88N) | ((other_88N == one_88N) & is_later_881)
    rank_8N = tl.sum(is_larger_88N.to(tl.int32), axis=0)
    total_N = tl.sum(magnitude_8N, axis=0)
    flip_N = 2 * tl.min(magnitude_8N, axis=0)
    even_N, odd_total_N = total_N - flip_N * odd_N, total_N - flip_N * (1 - odd_N)
    one_N = 2 * tl.sum(tl.where(rank_8N < 1, magnitude_8N, 0.0), axis=0)
    two_N = 2 * tl.sum(tl.where(rank_8N < 2, magnitude_8N, 0.0), axis=0)
    three_N = 2 * tl.sum(tl.where(rank_8N < 3, magnitude_8N, 0.0), axis=0)
    four_N = 2 * tl.sum(tl.where(rank_8N < 4, magnitude_8N, 0.0), axis=0)

    score_N, fives_N, nonzero_N = even_N - 2, tl.zeros_like(odd_N), tl.zeros_like(odd_N)
    score_N, fives_N, nonzero_N = _better(score_N, fives_N, nonzero_N, odd_total_N + one_N - 4, 0, 1)
    score_N, fives_N, nonzero_N = _better(score_N, fives_N, nonzero_N, even_N + two_N - 6, 0, 2)
    score_N, fives_N, nonzero_N = _better(score_N, fives_N, nonzero_N, odd_total_N + three_N - 8, 0, 3)
    score_N, fives_N, nonzero_N = _better(score_N, fives_N, nonzero_N, even_N + 2 * one_N - 8, 1, 1)
    score_N, fives_N, nonzero_N = _better(score_N, fives_N, nonzero_N, even_N + four_N - 10, 0, 4)
    score_N, fives_N, nonzero_N = _better(score_N, fives_N, nonzero_N, odd_total_N + one_N + two_N - 10, 1, 2)
    row_N = tl.zeros_like(odd_N) - 1
    for k in range(ROWS_C - NORM_12_C, ROWS_C):
        digits_8 = tl.load(table + DIGITS_AT + k * DIMENSION_C + d)
        weighted_8N = magnitude_8N * (digits_8.to(tl.float32) + 0.5)[:, None]
        norm_12_N = 2 * tl.sum(weighted_8N, axis=0) - 12 - 4 * tl.min(weighted_8N, axis=0) * (1 - odd_N)
        row_N = tl.where(norm_12_N > score_N, k, row_N)
        score_N = tl.maximum(norm_12_N, score_N)
    return score_N, rank_8N, fives_N, nonzero_N, row_N


@triton.jit
def _better(score_N, fives_N, nonzero_N, other_N, fives, nonzero):
    is_better_N = other_N > score_N
    fives_N, nonzero_N = tl.where(is_better_N, fives, fives_N), tl.where(is_better_N, nonzero, nonzero_N)
    return tl.maximum(other_N, score_N), fives_N, nonzero_N


@triton.jit
def nearest_e8_one_bit(x_8N, points):
    """Codes, int32 [N], and points [8, N] of the E8 1-bit codebook."""
    d = tl.arange(0, DIMENSION_C)
    # Not of x: a vector of NaN has a code too.
    best_N = tl.sum(tl.zeros_like(x_8N), axis=0) - float("inf")
    code_N = tl.zeros_like(best_N).to(tl.int32)
    for k in range(ONE_BIT_POINTS_C):
        point_8 = tl.load(points + k * (DIMENSION_C + 1) + d)
        score_N = tl.sum(x_8N * point_8[:, None], axis=0) - tl.load(points + k * (DIMENSION_C + 1) + DIMENSION_C)
        code_N = tl.where(score_N > best_N, k, code_N)
        best_N = tl.maximum(score_N, best_N)
    return code_N, tl.load(points + code_N[None, :] * (DIMENSION_C + 1) + d[:, None])
