"""Randomized Hadamard rotations of many tokens, before and after a product with packed weights.

As in hadamard.py, H_n = O ⊗ H_B and a block of outputs is a row of O times the input, then H_B. That reads a token as a
whole for every row of O. Of few tokens a program computes one block of up to 128, for there must be many programs; here
it computes several of up to 256. Sums of blocks are float32; H_B = H_G ⊗ H_L is multiplied by tensor cores in parts of
tf32, which together have about the precision of float32.

Shapes: M tokens, A blocks, B values of a block, by G times L, P blocks of a program, T values of a program, S rows
that H is multiplied with, R rank.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lqer.kernels.hadamard import odd_overlap, scale_up
from lqer.kernels.halves import place_of_halves
from lqer.kernels.lattice_decode import TILE_C

BLOCKS_AT_ONCE = 8  # that a program loads: one for each warp
BLOCKS_AT_ONCE_C = tl.constexpr(BLOCKS_AT_ONCE)
LEAST_SIDE = tl.constexpr(16)  # of a tensor core's product


@triton.constexpr_function
def turns_of(blocks: int) -> int:
    return -(-blocks // BLOCKS_AT_ONCE)


@triton.jit
def sum_blocks(
    values, stride, signs, rows, blocks, splits: tl.constexpr, A: tl.constexpr, B: tl.constexpr, P: tl.constexpr
):
    """P rows of O times the blocks of a token, float32 [P, B], and the largest of the token's values.

    values: partial sums of the token, `stride` elements apart. rows: float32 [blocks, P]. signs: multiplied with
    values, or None. A: blocks at most.
    """
    at_once: tl.constexpr = BLOCKS_AT_ONCE_C
    turns: tl.constexpr = turns_of(A)
    ours_P, own_B = tl.arange(0, P), tl.arange(0, B)
    sums_APB, largest_AB = tl.zeros((at_once, P, B), tl.float32), tl.zeros((at_once, B), tl.float32)
    for turn in tl.static_range(turns):
        blocks_A = turn * at_once + tl.arange(0, at_once)
        inside_AB = (blocks_A < blocks)[:, None] & (own_B >= 0)[None, :]
        inside_AP = (blocks_A < blocks)[:, None] & (ours_P >= 0)[None, :]
        place_AB = blocks_A[:, None] * B + own_B[None, :]
        x_AB = tl.load(values + place_AB, mask=inside_AB, other=0.0)
        for split in tl.static_range(1, splits):
            x_AB += tl.load(values + split * stride + place_AB, mask=inside_AB, other=0.0)
        if signs is not None:
            x_AB *= tl.load(signs + place_AB, mask=inside_AB, other=0.0)
        x_AB = x_AB.to(tl.float32)
        rows_AP = tl.load(rows + blocks_A[:, None] * P + ours_P[None, :], mask=inside_AP, other=0.0)
        sums_APB += x_AB[:, None, :] * rows_AP[:, :, None]
        largest_AB = tl.maximum(largest_AB, tl.abs(x_AB))
    return tl.sum(sums_APB, axis=0), tl.max(tl.max(largest_AB, axis=0), axis=0)


@triton.jit
def multiply_signs(v_SB):
    """H_B of each row [S, B], not normalised."""
    B: tl.constexpr = v_SB.shape[1]
    if B < LEAST_SIDE:
        signed_SBB = tl.where(odd_overlap(B)[None, :, :], -v_SB[:, :, None], v_SB[:, :, None])
        return tl.sum(signed_SBB, axis=1)
    else:
        return tl.dot(v_SB, tl.where(odd_overlap(B), -1.0, 1.0), input_precision="tf32x3")


@triton.jit
def rotate_blocks(v_PB):
    """H_B of each of P blocks, not normalised [P B]."""
    P: tl.constexpr = v_PB.shape[0]
    B: tl.constexpr = v_PB.shape[1]
    L: tl.constexpr = min(B, LEAST_SIDE)
    G: tl.constexpr = B // L
    v_PGL = multiply_signs(v_PB.reshape(P * G, L)).reshape(P, G, L)
    if G == 1:
        return v_PGL.reshape(P * B)
    else:
        v_PLG = multiply_signs(v_PGL.permute(0, 2, 1).reshape(P * L, G)).reshape(P, L, G)
        return v_PLG.permute(0, 2, 1).reshape(P * B)


@triton.jit
def rotate_input_kernel(
    x,  # [M, I]
    signs,  # [I], or None: no rotation
    rows,  # float32 [programs of a token, A, P], see rotations_launch.py
    a_values,  # Aᵀ [RP, IP] in the dtype of x, or None
    x_out,  # float16, these two as in halves.py
    steps,
    partial,  # of x' A, float32 [programs of a token, M, RP], or None
    M,
    K,
    x_stride,
    rank: tl.constexpr,
    tiles: tl.constexpr,
    lattice: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    P: tl.constexpr,
    BLOCK_I: tl.constexpr,  # I, as a power of two
    BLOCK_R: tl.constexpr,
    factor: tl.constexpr,  # the inverse of the headroom of float16
    reach: tl.constexpr,  # no element of x' is larger than so many times the largest of signs ⊙ x
    late: tl.constexpr,  # the product starts when this kernel ends
    pdl: tl.constexpr,
):
    """P blocks of x' = H (signs ⊙ x), or of x itself, and their partial sum of x' A."""
    program, m = tl.program_id(0), tl.program_id(1)
    padded: tl.constexpr = tiles * TILE_C
    T: tl.constexpr = P * B
    columns_T = program * T + tl.arange(0, T)
    dtype: tl.constexpr = x.dtype.element_ty
    if pdl:
        if not late:
            gdc_launch_dependents()
        gdc_wait()
    row = x + m.to(tl.int64) * x_stride
    if signs is not None:
        v_PB, largest = sum_blocks(row, 0, signs, rows + program * (A * P), A, 1, A, B, P)
        x_T = rotate_blocks(v_PB * factor).to(dtype).to(tl.float32)
    else:
        x_T = tl.load(row + columns_T, mask=columns_T < K, other=0.0).to(tl.float32)
        whole_I = tl.arange(0, BLOCK_I)
        largest = tl.max(tl.abs(tl.load(row + whole_I, mask=whole_I < K, other=0.0).to(tl.float32)), axis=0)
    exponent, up = scale_up(largest * reach)
    place_T = place_of_halves(m.to(tl.int64), columns_T, tiles, lattice)
    tl.store(x_out + place_T, (x_T * up).to(tl.float16), mask=columns_T < padded)
    # Every program of a token stores the same; not finite where the token is not.
    tl.store(steps + m, ((exponent - 14) << 23).to(tl.float32, bitcast=True) + (largest - largest))
    if rank > 0:
        for first in tl.static_range(0, rank, BLOCK_R):
            ranks_R = first + tl.arange(0, BLOCK_R)
            inside_RT = (columns_T < padded)[None, :] & (ranks_R < rank)[:, None]
            a_RT = tl.load(a_values + ranks_R[:, None] * padded + columns_T[None, :], mask=inside_RT, other=0.0)
            sum_R = tl.sum(a_RT.to(tl.float32) * x_T[None, :], axis=1)
            tl.store(partial + (program * M + m) * rank + ranks_R, sum_R)
    if pdl and late:
        gdc_launch_dependents()


@triton.jit
def rotate_output_kernel(
    y,  # float32 [splits, M, O]
    signs,  # [O]
    rows,  # of the programs of a token, each float32 [A of its rotation, P], one after the other
    places,  # int32 [programs, 5], see rotations_launch.py
    bias,  # [O], or None
    y_out,  # [M, O]
    M,
    N,
    splits: tl.constexpr,
    A: tl.constexpr,  # of the longest rotation
    B: tl.constexpr,
    P: tl.constexpr,
    factor: tl.constexpr,  # the headroom of float16
    pdl: tl.constexpr,
):
    """P blocks of signs ⊙ Hᵀ y + bias, of the sum of all y."""
    place, m = places + tl.program_id(0) * 5, tl.program_id(1).to(tl.int64)
    # Segments start at multiples of 128, so that a thread can load several values at once.
    start = tl.multiple_of(tl.load(place), 16)
    blocks, first_row = tl.load(place + 1), tl.load(place + 2)
    column, present = tl.load(place + 3), tl.load(place + 4)
    columns_T = column + tl.arange(0, P * B)
    inside_T = tl.arange(0, P * B) < present * B
    signs_T = tl.load(signs + columns_T, mask=inside_T, other=0.0).to(tl.float32) * factor
    if bias is not None:
        bias_T = tl.load(bias + columns_T, mask=inside_T, other=0.0).to(tl.float32)
    if pdl:
        gdc_wait()
        gdc_launch_dependents()
    v_PB, _ = sum_blocks(y + m * N + start, M * N, None, rows + first_row * P, blocks, splits, A, B, P)
    y_T = rotate_blocks(v_PB) * signs_T
    if bias is not None:
        y_T += bias_T
    tl.store(y_out + m * N + columns_T, y_T.to(y_out.dtype.element_ty), mask=inside_T)
