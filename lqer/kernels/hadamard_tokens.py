"""Randomized Hadamard rotations of several tokens at once; for one token see hadamard.py.

H_n = O ⊗ H_B as there, with blocks of up to 512: a program reads all of its tokens for one block of outputs, so large
blocks read less. A block of outputs is one row of O times the input, B sums, and H_B = H_P ⊗ H_128, of which H_128 is a
product with a matrix of 1 and -1 on tensor cores. These sums, float32, are three bfloat16 numbers each, without loss,
so a product has float32's precision.

Shapes: M tokens of a program, A blocks, B values of a block, P tiles of 128 columns of a block, T columns of a tile,
N tokens and tiles of a program (M P, 16), R rank.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lqer.kernels.hadamard import LARGEST_ROOM, odd_overlap, output_place, scale_up
from lqer.kernels.lattice_decode import TILE_C, token_order
from lqer.kernels.rounding import ROUNDER
from lqer.kernels.runtime import INTERPRETED

ROWS_AT_ONCE = tl.constexpr(16)  # of a tensor core
BLOCKS_AT_ONCE = tl.constexpr(8)
# The interpreter multiplies no bfloat16.
PART = tl.constexpr(tl.float32 if INTERPRETED else tl.bfloat16)


@triton.jit
def load_sums(x, signs, row, rows_M, stride, limit, A, B: tl.constexpr, factor: tl.constexpr):
    """A row of O [A], times the tokens [M, B], float32; zero if limit is 0, else it is A. signs: [I], or None."""
    columns_B = tl.arange(0, B)
    sum_MB = tl.zeros((rows_M.shape[0], B), tl.float32)
    for first in range(0, A, BLOCKS_AT_ONCE):
        for i in tl.static_range(BLOCKS_AT_ONCE):
            a = first + i
            inside = limit > a
            weight = tl.load(row + a, mask=inside, other=0.0) * factor
            place_B = a * B + columns_B
            inside_B = limit > a + 0 * columns_B
            x_MB = tl.load(
                x + rows_M.to(tl.int64)[:, None] * stride + place_B[None, :], mask=inside_B[None, :], other=0.0
            )
            if signs is not None:
                x_MB *= tl.load(signs + place_B, mask=inside_B, other=0.0)[None, :]
            sum_MB += x_MB.to(tl.float32) * weight
    return sum_MB


@triton.jit
def transform(sum_MB, sign_TT):
    """H_B of each row, not normalised: float32 [M, P, T]. sign_TT: of `sign_matrix`."""
    M: tl.constexpr = sum_MB.shape[0]
    P: tl.constexpr = sum_MB.shape[1] // TILE_C
    rest_NT = sum_MB.reshape(M * P, TILE_C)
    total_NT = tl.zeros((M * P, TILE_C), tl.float32)
    for _ in tl.static_range(3):
        part_NT = rest_NT.to(PART)
        total_NT = tl.dot(part_NT, sign_TT, total_NT)
        rest_NT -= part_NT.to(tl.float32)
    total_MPT = total_NT.reshape(M, P, TILE_C)
    if P == 1:
        return total_MPT
    else:
        negative_PP = odd_overlap(P)[None, :, :, None]
        return tl.sum(tl.where(negative_PP, -total_MPT[:, None, :, :], total_MPT[:, None, :, :]), axis=2)


@triton.jit
def sign_matrix():
    """H_128, not normalised, in bfloat16."""
    return tl.where(odd_overlap(TILE_C), -1.0, 1.0).to(PART)


@triton.jit
def hadamard_input_tokens_kernel(
    x,  # [M, I]
    signs,  # [I]
    outer,  # O, float32 [A, A]
    a_values,  # Aᵀ [RP, IP] in the dtype of x, or None
    x_out,  # these two as in hadamard.py
    steps,
    partial,  # of x' A, float32 [programs along I, M, RP], or None
    M,
    x_stride,
    rank: tl.constexpr,
    tiles: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    factor: tl.constexpr,  # 1 / sqrt(B), and the headroom of float16
    pdl: tl.constexpr,
):
    """A block of x' = H (signs ⊙ x) of some tokens, with steps, and their partial sums of x' A."""
    block, padded = tl.program_id(0), tiles * TILE_C
    P: tl.constexpr = B // TILE_C
    TOKENS: tl.constexpr = ROWS_AT_ONCE // P
    rows_M = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    dtype: tl.constexpr = x.dtype.element_ty
    sign_TT = sign_matrix()
    if pdl:
        gdc_launch_dependents()
        gdc_wait()
    limit = tl.where(block < A, A, 0)
    sum_MB = load_sums(x, signs, outer + block * A, tl.minimum(rows_M, M - 1), x_stride, limit, A, B, factor)
    rotated_MPT = transform(sum_MB, sign_TT).to(dtype)
    tiles_P = block * P + tl.arange(0, P)
    inside_MP = (rows_M < M)[:, None] & (tiles_P < tiles)[None, :]
    x_MPT = rotated_MPT.to(tl.float32)
    largest_MP = tl.max(tl.abs(x_MPT), axis=2)
    token_M = rows_M.to(tl.int64)
    step_MP = token_M[:, None] * tiles + tiles_P[None, :]
    columns_PT = tiles_P[:, None] * TILE_C + tl.arange(0, TILE_C)[None, :]
    inside_MPT = inside_MP[:, :, None] & (columns_PT >= 0)[None, :, :]
    if x_out.dtype.element_ty == tl.float16:
        exponent_MP, up_MP = scale_up(largest_MP)
        place_MPT = token_M[:, None, None] * padded + columns_PT[None, :, :]
        tl.store(x_out + place_MPT, (x_MPT * up_MP[:, :, None]).to(tl.float16), mask=inside_MPT)
        tl.store(steps + step_MP, ((exponent_MP - 14) << 23).to(tl.float32, bitcast=True), mask=inside_MP)
    else:
        exponent_MP, up_MP = scale_up(largest_MP * LARGEST_ROOM)
        integers_MPT = ((x_MPT * up_MP[:, :, None] + ROUNDER) - ROUNDER).to(tl.int32)
        low_MPT = ((integers_MPT + 128) & 255) - 128
        high_MPT = (integers_MPT - low_MPT) >> 8
        if steps.dtype.element_ty == tl.float32:
            order_PT = columns_PT
            finite_MP = tl.sum(x_MPT - x_MPT, axis=2)
            step = ((exponent_MP - 21) << 23).to(tl.float32, bitcast=True) + finite_MP
            tl.store(steps + step_MP, step, mask=inside_MP)
        else:
            order_PT = token_order(columns_PT)
            tl.store(steps + step_MP * 2, (exponent_MP - 19) << 23, mask=inside_MP)
            tl.store(steps + step_MP * 2 + 1, -120 * tl.sum(integers_MPT, axis=2), mask=inside_MP)
        place_MPT = x_out + token_M[:, None, None] * (2 * padded) + order_PT[None, :, :]
        tl.store(place_MPT, high_MPT.to(tl.int8), mask=inside_MPT)
        tl.store(place_MPT + padded, low_MPT.to(tl.int8), mask=inside_MPT)
    if rank > 0:
        rows_N = tl.arange(0, ROWS_AT_ONCE)
        x_NT = rotated_MPT.reshape(ROWS_AT_ONCE, TILE_C)
        columns_T = tl.arange(0, TILE_C)
        for first in tl.static_range(0, rank, BLOCK_R):
            ranks_R = first + tl.arange(0, BLOCK_R)
            sum_NR = tl.zeros((ROWS_AT_ONCE, BLOCK_R), tl.float32)
            for p in tl.static_range(P):
                tile = block * P + p
                place_TR = a_values + ranks_R[None, :] * padded + (tile * TILE_C + columns_T)[:, None]
                a_TR = tl.load(place_TR, mask=((tile + 0 * columns_T) < tiles)[:, None], other=0.0)
                sum_NR = tl.dot(tl.where((rows_N % P == p)[:, None], x_NT, 0.0), a_TR, sum_NR)
            sum_MR = tl.sum(sum_NR.reshape(TOKENS, P, BLOCK_R), axis=1)
            place_MR = partial + (block * M + rows_M)[:, None] * rank + ranks_R[None, :]
            tl.store(place_MR, sum_MR, mask=(rows_M < M)[:, None])


@triton.jit
def hadamard_output_tokens_kernel(
    y,  # float32 [M, O]
    signs,  # [O]
    outer,  # these two as in hadamard.py
    places,
    bias,  # [O], or None
    y_out,  # [M, O]
    M,
    N,
    A: tl.constexpr,  # of the longest rotation
    B: tl.constexpr,
    factor: tl.constexpr,  # 1 / sqrt(B), and the headroom of float16
    pdl: tl.constexpr,
):
    """A block of signs ⊙ Hᵀ y + bias of some tokens."""
    block = tl.program_id(0)
    P: tl.constexpr = B // TILE_C
    TOKENS: tl.constexpr = ROWS_AT_ONCE // P
    rows_M = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    start, blocks, row, column = output_place(places, block, A, B)
    columns_PT = column + tl.arange(0, P)[:, None] * TILE_C + tl.arange(0, TILE_C)[None, :]
    signs_PT = tl.load(signs + columns_PT).to(tl.float32)
    sign_TT = sign_matrix()
    if pdl:
        gdc_wait()
        gdc_launch_dependents()
    sum_MB = load_sums(y + start, None, outer + row, tl.minimum(rows_M, M - 1), N, blocks, blocks, B, factor)
    y_MPT = transform(sum_MB, sign_TT) * signs_PT[None, :, :]
    if bias is not None:
        y_MPT += tl.load(bias + columns_PT).to(tl.float32)[None, :, :]
    place_MPT = rows_M.to(tl.int64)[:, None, None] * N + columns_PT[None, :, :]
    inside_MPT = (rows_M < M)[:, None, None] & (columns_PT >= 0)[None, :, :]
    tl.store(y_out + place_MPT, y_MPT.to(y_out.dtype.element_ty), mask=inside_MPT)
