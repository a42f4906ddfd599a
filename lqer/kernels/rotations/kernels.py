"""Randomized Hadamard rotations of tokens, before and after a product with packed weights (lqer.transforms.hadamard).

H_n = O ⊗ H_B, with B a power of two and O an orthonormal matrix: the factor that is no power of two and the rest of the
power of two. A block of B outputs is one row of O times the input, B sums, and one H_B. A program computes several
blocks, independently of all others: it reads its token as a whole. Sums are float32 and normalised before they are
added.

Blocks of 128 and 256 are computed by lanes that each have some columns (lanes.py). Smaller ones, of lengths
with a large odd factor, are multiplied by H_B = H_G ⊗ H_L on tensor cores in parts of tf32, which together have about
the precision of float32; so are all of them in Triton's interpreter.

Shapes: M tokens, A blocks, B values of a block, by G times L, P blocks of a program, T values of a program, N tiles of
them, C columns of a tile, S rows that H is multiplied with, R rank.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lqer.kernels.lattice.decode import TILE_C
from lqer.kernels.rotations.lanes import (
    add_blocks,
    finish_blocks,
    gated,
    load_rows,
    load_values,
    rounded,
    scaled,
    sum_squares,
    weighted,
)
from lqer.kernels.rotations.token_stores import (
    load_four,
    store_bytes,
    store_bytes_of_lanes,
    store_four,
    store_halves,
    store_halves_of_lanes,
    store_integers,
    store_integers_of_lanes,
    store_tiles,
)
from lqer.kernels.trellis.byte_sums import joined

BLOCKS_AT_ONCE = 8  # that a program loads: one for each warp
BLOCKS_AT_ONCE_C = tl.constexpr(BLOCKS_AT_ONCE)
LEAST_SIDE = tl.constexpr(16)  # of a tensor core's product


@triton.jit
def odd_overlap(size: tl.constexpr):
    """Where H_size is negative [size, size]: i & j has an odd number of bits."""
    bits = tl.arange(0, size)[:, None] & tl.arange(0, size)[None, :]
    bits ^= bits >> 8
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return (bits & 1) != 0


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.constexpr_function
def turns_of(blocks: int) -> int:
    return -(-blocks // BLOCKS_AT_ONCE)


@triton.jit
def sum_blocks(
    values,  # partial sums of the token, `stride` elements apart
    stride,
    signs,  # multiplied with values, or None
    norm,  # whose sum with `offset` is multiplied with values, too, or None
    up,  # multiplied with silu(values), of which all is made then, or None
    rows,  # float32 [blocks, P]
    blocks,
    offset: tl.constexpr,
    splits: tl.constexpr,
    A: tl.constexpr,  # blocks at most
    B: tl.constexpr,
    P: tl.constexpr,
):
    """P rows of O times the blocks of a token, float32 [P, B].

    Also the largest of what they are multiplied with, and the sum of the squares of the token's values.
    """
    at_once: tl.constexpr = BLOCKS_AT_ONCE_C
    turns: tl.constexpr = turns_of(A)
    ours_P, own_B = tl.arange(0, P), tl.arange(0, B)
    sums_APB, largest_AB = tl.zeros((at_once, P, B), tl.float32), tl.zeros((at_once, B), tl.float32)
    squares_AB = tl.zeros((at_once, B), tl.float32)
    for turn in tl.static_range(turns):
        blocks_A = turn * at_once + tl.arange(0, at_once)
        inside_AB = (blocks_A < blocks)[:, None] & (own_B >= 0)[None, :]
        inside_AP = (blocks_A < blocks)[:, None] & (ours_P >= 0)[None, :]
        place_AB = blocks_A[:, None] * B + own_B[None, :]
        x_AB = tl.load(values + place_AB, mask=inside_AB, other=0.0)
        for split in tl.static_range(1, splits):
            x_AB += tl.load(values + split * stride + place_AB, mask=inside_AB, other=0.0)
        squares_AB += x_AB.to(tl.float32) * x_AB.to(tl.float32)
        if up is not None:
            x_AB = silu(x_AB.to(tl.float32)) * tl.load(up + place_AB, mask=inside_AB, other=0.0).to(tl.float32)
        if signs is not None:
            x_AB *= tl.load(signs + place_AB, mask=inside_AB, other=0.0)
        x_AB = x_AB.to(tl.float32)
        if norm is not None:
            x_AB *= tl.load(norm + place_AB, mask=inside_AB, other=0.0).to(tl.float32) + offset
        rows_AP = tl.load(rows + blocks_A[:, None] * P + ours_P[None, :], mask=inside_AP, other=0.0)
        sums_APB += x_AB[:, None, :] * rows_AP[:, :, None]
        largest_AB = tl.maximum(largest_AB, tl.abs(x_AB))
    largest = tl.max(tl.max(largest_AB, axis=0), axis=0)
    return tl.sum(sums_APB, axis=0), largest, tl.sum(tl.sum(squares_AB, axis=0), axis=0)


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
def load_ranks(a_values, first, columns_T, rank: tl.constexpr, padded: tl.constexpr, BLOCK_R: tl.constexpr):
    """Columns of Aᵀ for BLOCK_R ranks from `first` on."""
    ranks_R = first + tl.arange(0, BLOCK_R)
    inside_RT = (columns_T < padded)[None, :] & (ranks_R < rank)[:, None]
    return tl.load(a_values + ranks_R[:, None] * padded + columns_T[None, :], mask=inside_RT, other=0.0)


@triton.jit
def rotate_input_kernel(
    x,  # [M, I]
    signs,  # [I], or None: no rotation
    norm,  # weights [I] of a norm of x before its rotation, or None
    up,  # [M, I]: silu(x) ⊙ up is rotated, or None
    rows,  # float32 [programs of a token, padded_A, P], see launch.py
    a_values,  # Aᵀ [RP, IP] in the dtype of x, or None
    x_out,  # these two as `kind` says, see token_stores.py
    steps,
    partial,  # of x' A, float32 [programs of a token, M, RP], or None
    M,
    K,
    x_stride,
    up_stride,
    rank: tl.constexpr,
    tiles: tl.constexpr,
    kind: tl.constexpr,
    lattice: tl.constexpr,
    lanes: tl.constexpr,  # compute blocks of 128 or 256
    A: tl.constexpr,
    padded_A: tl.constexpr,
    B: tl.constexpr,
    P: tl.constexpr,
    BLOCK_I: tl.constexpr,  # I, as a power of two
    BLOCK_R: tl.constexpr,
    offset: tl.constexpr,  # of the weights of the norm
    eps: tl.constexpr,
    factor: tl.constexpr,  # the inverse of the headroom of float16
    reach: tl.constexpr,  # no element of x' is larger than so many times the largest of x, with factor, before H
    pdl: tl.constexpr,
):
    """P blocks of x' = H (signs ⊙ x), of x normed or gated, or of x itself, and their partial sum of x' A."""
    program, m = tl.program_id(0), tl.program_id(1)
    padded: tl.constexpr = tiles * TILE_C
    T: tl.constexpr = P * B
    columns_T = program * T + tl.arange(0, T)
    dtype: tl.constexpr = x.dtype.element_ty
    warps: tl.constexpr = T // TILE_C
    normed: tl.constexpr = norm is not None
    own_rows = rows
    if pdl:
        # The product may prefetch its codes while this kernel still waits for x.
        gdc_launch_dependents()
    if signs is not None:
        own_rows = rows + program * (padded_A * P)
    # All of this is independent of the previous kernel.
    if rank > 0:
        a_RT = load_ranks(a_values, 0, columns_T, rank, padded, BLOCK_R)
    if lanes:
        warp_T = tl.arange(0, 32 * warps) // 32
        lane_signs = load_values(signs, 0, warp_T, A, B, 1, padded_A // warps, warps)
        if norm is not None:
            lane_norm = load_values(norm, 0, warp_T, A, B, 1, padded_A // warps, warps)
        lane_rows = load_rows(own_rows, warp_T, P, padded_A // warps, warps)
    if pdl:
        gdc_wait()
    row = x + m.to(tl.int64) * x_stride
    row_up = None
    if up is not None:
        row_up = up + m.to(tl.int64) * up_stride
    if lanes:
        turns: tl.constexpr = padded_A // warps
        of_token: tl.constexpr = kind == "halves"
        lane_x = load_values(row, 0, warp_T, A, B, 1, turns, warps)
        squares_T = None
        if up is not None:
            lane_up = load_values(row_up, 0, warp_T, A, B, 1, turns, warps)
            own_x = gated(lane_x, lane_signs, lane_up, dtype, B, turns)
            sums = add_blocks(own_x, None, lane_rows, tl.float32, of_token, B, P, turns)
        elif normed:
            squares_T = sum_squares(lane_x, warp_T, A, dtype, B, turns, warps)
            offset_T = tl.zeros(warp_T.shape, tl.float32) + offset
            own_x = weighted(lane_x, lane_signs, lane_norm, offset_T, dtype, B, turns)
            sums = add_blocks(own_x, None, lane_rows, tl.float32, of_token, B, P, turns)
        else:
            sums = add_blocks(lane_x, lane_signs, lane_rows, dtype, of_token, B, P, turns)
        values = finish_blocks(sums, squares_T, B, P, "token" if of_token else "tile")
        scale = factor
        if normed:
            scale = tl.rsqrt(values[5] * (1 / (A * B)) + eps) * factor
        values = rounded(values, scale, dtype, 5)
        x_T = joined(values[:4], 4).reshape(T)
    elif signs is not None:
        v_PB, largest, squares = sum_blocks(row, 0, signs, norm, row_up, own_rows, A, offset, 1, A, B, P)
        scale = factor
        if normed:
            scale = tl.rsqrt(squares * (1 / (A * B)) + eps) * factor
        x_T = rotate_blocks(v_PB * scale).to(dtype).to(tl.float32)
        largest_T = tl.zeros((T,), tl.float32) + largest * scale
    else:
        x_T = tl.load(row + columns_T, mask=columns_T < K, other=0.0).to(tl.float32)
        whole_I = tl.arange(0, BLOCK_I)
        largest = tl.max(tl.abs(tl.load(row + whole_I, mask=whole_I < K, other=0.0).to(tl.float32)), axis=0)
        largest_T = tl.zeros((T,), tl.float32) + largest
    if lanes and kind == "bytes":
        own_x = x_out + m.to(tl.int64) * (2 * padded)
        store_bytes_of_lanes(values, own_x, steps + m * tiles, tl.arange(0, 32 * warps), program, tiles)
    elif lanes and kind == "halves":
        store_halves_of_lanes(values, reach, x_out, steps, m, tl.arange(0, 32 * warps), program, tiles, lattice)
    elif lanes and kind == "integers":
        own_x = x_out + m.to(tl.int64) * (2 * padded)
        store_integers_of_lanes(values, own_x, steps + m * (2 * tiles), tl.arange(0, 32 * warps), program, tiles)
    elif kind == "halves":
        store_halves(x_T, largest_T, reach, x_out, steps, m, columns_T, tiles, lattice)
    else:
        tiles_N = program * warps + tl.arange(0, warps)
        columns_NC, x_NC = columns_T.reshape(warps, TILE_C), x_T.reshape(warps, TILE_C)
        if kind == "tiles":
            store_tiles(x_NC, x_out + m.to(tl.int64) * padded, steps + m * tiles, columns_NC, tiles_N, tiles)
        elif kind == "bytes":
            store_bytes(x_NC, x_out + m.to(tl.int64) * (2 * padded), steps + m * tiles, columns_NC, tiles_N, tiles)
        else:
            own_steps = steps + m * (2 * tiles)
            store_integers(x_NC, x_out + m.to(tl.int64) * (2 * padded), own_steps, columns_NC, tiles_N, tiles)
    if rank > 0:
        for first in tl.static_range(0, rank, BLOCK_R):
            if first > 0:
                a_RT = load_ranks(a_values, first, columns_T, rank, padded, BLOCK_R)
            sum_R = tl.sum(a_RT.to(tl.float32) * x_T[None, :], axis=1)
            ranks_R = first + tl.arange(0, BLOCK_R)
            tl.store(partial + (program * M + m) * rank + ranks_R, sum_R, mask=ranks_R < rank)


@triton.jit
def rotate_output_kernel(
    y,  # float32 [splits, M, O]
    signs,  # [O]
    rows,  # of the programs of a token, each float32 [padded A of its rotation, P], one after the other
    places,  # int32 [programs, 5], see launch.py
    bias,  # [O], or None
    residual,  # [M, O] in the dtype of y_out, or None
    y_out,  # [M, O]
    M,
    N,
    splits: tl.constexpr,
    lanes: tl.constexpr,  # compute blocks of 128 or 256
    A: tl.constexpr,  # of the longest rotation
    padded_A: tl.constexpr,
    B: tl.constexpr,
    P: tl.constexpr,
    factor: tl.constexpr,  # the headroom of float16
    pdl: tl.constexpr,
):
    """P blocks of signs ⊙ Hᵀ y + bias + residual, of the sum of all y."""
    place, m = places + tl.program_id(0) * 5, tl.program_id(1).to(tl.int64)
    # Segments start at multiples of 128, so that a thread can load several values at once.
    start = tl.multiple_of(tl.load(place), 16)
    blocks, first_row = tl.load(place + 1), tl.load(place + 2)
    column, present = tl.load(place + 3), tl.load(place + 4)
    own_rows, own = rows + first_row * P, y + m * N + start
    warps: tl.constexpr = P * B // TILE_C
    if lanes:
        # The first of a lane's four columns.
        own_T = tl.arange(0, 32 * warps) * 4
        warp_T = own_T // TILE_C
        inside_T = own_T < present * B
        signs_4, bias_4 = load_four(signs + column + own_T, inside_T), None
        if bias is not None:
            bias_4 = load_four(bias + column + own_T, inside_T)
        lane_rows = load_rows(own_rows, warp_T, P, padded_A // warps, warps)
    if pdl:
        gdc_wait()
        gdc_launch_dependents()
    if lanes:
        residual_4 = None
        if residual is not None:
            residual_4 = load_four(residual + m * N + column + own_T, inside_T)
        lane_y = load_values(own, M * N, warp_T, blocks, B, splits, padded_A // warps, warps)
        sums = add_blocks(lane_y, None, lane_rows, tl.float32, False, B, P, padded_A // warps)
        y_4 = scaled(finish_blocks(sums, None, B, P, ""), signs_4, bias_4, residual_4, factor, 4)
        store_four(y_out + m * N + column + own_T, y_4, inside_T)
    else:
        columns_T = column + tl.arange(0, P * B)
        inside_T = tl.arange(0, P * B) < present * B
        v_PB, _, _ = sum_blocks(own, M * N, None, None, None, own_rows, blocks, 0.0, splits, A, B, P)
        y_T = rotate_blocks(v_PB) * (tl.load(signs + columns_T, mask=inside_T, other=0.0).to(tl.float32) * factor)
        if bias is not None:
            y_T += tl.load(bias + columns_T, mask=inside_T, other=0.0).to(tl.float32)
        if residual is not None:
            y_T += tl.load(residual + m * N + columns_T, mask=inside_T, other=0.0).to(tl.float32)
        tl.store(y_out + m * N + columns_T, y_T.to(y_out.dtype.element_ty), mask=inside_T)
