"""Randomized Hadamard rotations of tokens, before and after a product with packed weights (lqer.transforms.hadamard).

H_n = O ⊗ H_B, with B a power of two and O an orthonormal matrix: the factor that is no power of two and the rest of the
power of two. A block of B outputs is one row of O times the input, B sums, and one H_B, so that every program computes
one block independently of the others. Sums are float32 and normalised before they are added.

Shapes: M tokens, A blocks, B values of a block, by G times L, P blocks of a program, T columns of a tile, R rank.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lqer.kernels.lattice_decode import TILE_C, token_order
from lqer.kernels.rounding import ROUNDER

# 2^15 / (127 * 256 + 127): the largest value of a tile gets 15 bits without an h above 127.
LARGEST_ROOM = tl.constexpr(32768 / 32639)
LEAST_EXPONENT = tl.constexpr(32)  # keeps the step and its inverse normal
LEAST_EXPONENT_UP = tl.constexpr(2 * 127 + 14)
FACTOR = tl.constexpr(8)  # the inner factor of H_B


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
def _blocks(x_AB, rows_AP):
    """Blocks of H x [P, B], not normalised by sqrt(B); rows_AP: the blocks' rows of O, float32."""
    B: tl.constexpr = x_AB.shape[1]
    P: tl.constexpr = rows_AP.shape[1]
    # H_B = H_G ⊗ H_L takes B (G + L) additions instead of B B.
    L: tl.constexpr = min(B, FACTOR)
    G: tl.constexpr = B // L
    v_PGL = tl.sum(x_AB[:, None, :] * rows_AP[:, :, None], axis=0).reshape(P, G, L)
    signed_PGLL = tl.where(odd_overlap(L)[None, None, :, :], -v_PGL[:, :, :, None], v_PGL[:, :, :, None])
    v_PGL = tl.sum(signed_PGLL, axis=2)
    signed_PGGL = tl.where(odd_overlap(G)[None, :, :, None], -v_PGL[:, :, None, :], v_PGL[:, :, None, :])
    return tl.sum(signed_PGGL, axis=1).reshape(P, B)


@triton.jit
def hadamard_input_kernel(
    x,  # [M, I]
    signs,  # [I], or None: no rotation
    outer,  # O, float32 [A, A]
    a_values,  # Aᵀ [RP, IP] in the dtype of x, or None
    x_out,  # int8 [M, 2, IP], in token order (lattice.py) or not (byte_sums.py), or float16 [M, IP] (trellis.py)
    steps,  # int32 [M, tiles, 2] for the first, see lattice_gemm.py, or float32 [M, tiles]
    partial,  # of x' A, float32 [tiles, M, RP], or None
    M,
    K,
    x_stride,
    rank: tl.constexpr,
    tiles: tl.constexpr,
    A: tl.constexpr,
    BLOCK_A: tl.constexpr,
    B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    factor: tl.constexpr,  # 1 / sqrt(B), and the headroom of float16
    late: tl.constexpr,  # the product starts when this kernel ends
    pdl: tl.constexpr,
):
    """One tile of x' = H (signs ⊙ x), or of x itself, with a step, and its partial sum of x' A."""
    tile, m = tl.program_id(0), tl.program_id(1)
    padded: tl.constexpr = tiles * TILE_C
    columns_T = tile * TILE_C + tl.arange(0, TILE_C)
    blocks_A = tl.arange(0, BLOCK_A)
    dtype: tl.constexpr = x.dtype.element_ty
    if pdl and not late:
        # The product may prefetch its codes while this kernel still waits for x.
        gdc_launch_dependents()
    # All of this is independent of the previous kernel.
    if signs is not None:
        P: tl.constexpr = TILE_C // B
        ours_P = tile * P + tl.arange(0, P)
        inside_AP = (blocks_A < A)[:, None] & (ours_P < A)[None, :]
        rows_AP = tl.load(outer + ours_P[None, :] * A + blocks_A[:, None], mask=inside_AP, other=0.0) * factor
        place_AB = blocks_A[:, None] * B + tl.arange(0, B)[None, :]
        signs_AB = tl.load(signs + place_AB, mask=(blocks_A < A)[:, None], other=0.0)
    if rank > 0:
        a_RT = tl.load(a_values + tl.arange(0, BLOCK_R)[:, None] * padded + columns_T[None, :])
    if pdl:
        gdc_wait()
    row = x + m.to(tl.int64) * x_stride
    if signs is not None:
        x_AB = tl.load(row + place_AB, mask=(blocks_A < A)[:, None], other=0.0) * signs_AB
        x_T = _blocks(x_AB.to(tl.float32), rows_AP).reshape(TILE_C).to(dtype).to(tl.float32)
    else:
        x_T = tl.load(row + columns_T, mask=columns_T < K, other=0.0).to(tl.float32)
    if x_out.dtype.element_ty == tl.float16:
        store_halves(x_T, x_out + m.to(tl.int64) * padded, steps + m * tiles + tile, columns_T)
    elif steps.dtype.element_ty == tl.float32:
        store_bytes(x_T, x_out + m.to(tl.int64) * (2 * padded), steps + m * tiles + tile, columns_T, padded)
    else:
        store_integers(x_T, x_out + m.to(tl.int64) * (2 * padded), steps + (m * tiles + tile) * 2, columns_T, padded)
    if rank > 0:
        for first in tl.static_range(0, rank, BLOCK_R):
            if first > 0:
                place = (first + tl.arange(0, BLOCK_R))[:, None] * padded + columns_T[None, :]
                a_RT = tl.load(a_values + place)
            sum_R = tl.sum(a_RT.to(tl.float32) * x_T[None, :], axis=1)
            tl.store(partial + (tile * M + m) * rank + first + tl.arange(0, BLOCK_R), sum_R)
    if pdl and late:
        gdc_launch_dependents()


@triton.jit
def scale_up(largest):
    """The biased exponent of a value, and the power of two that brings it to 2^14 and above, below 2^15."""
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, LEAST_EXPONENT)
    return exponent, ((-exponent + LEAST_EXPONENT_UP) << 23).to(tl.float32, bitcast=True)


@triton.jit
def store_halves(x_T, x_out, step, columns_T):
    """Write a tile of a token as float16, with its step (trellis.py)."""
    exponent, up = scale_up(tl.max(tl.abs(x_T), axis=0))
    tl.store(x_out + columns_T, (x_T * up).to(tl.float16))
    tl.store(step, ((exponent - 14) << 23).to(tl.float32, bitcast=True))


@triton.jit
def _two_bytes(x_T):
    """x as 256 h + l with h and l from -128 to 127, the integers 256 h + l, and the biased exponent of the largest."""
    # A little larger than the largest value, so that no h is 128; with its exponent the largest value has 15 bits.
    exponent, up = scale_up(tl.max(tl.abs(x_T), axis=0) * LARGEST_ROOM)
    integers_T = ((x_T * up + ROUNDER) - ROUNDER).to(tl.int32)
    low_T = ((integers_T + 128) & 255) - 128
    return (integers_T - low_T) >> 8, low_T, integers_T, exponent


@triton.jit
def store_bytes(x_T, x_out, step, columns_T, padded: tl.constexpr):
    """Write a tile of a token as bytes h and l (byte_sums.py)."""
    high_T, low_T, _, exponent = _two_bytes(x_T)
    tl.store(x_out + columns_T, high_T.to(tl.int8))
    tl.store(x_out + padded + columns_T, low_T.to(tl.int8))
    # 2^(exponent - 127 - 14), times the 1 / 128 of values; not finite where x is not.
    tl.store(step, ((exponent - 21) << 23).to(tl.float32, bitcast=True) + tl.sum(x_T - x_T, axis=0))


@triton.jit
def store_integers(x_T, x_out, steps, columns_T, padded: tl.constexpr):
    """Write a tile of a token as integers 256 h + l with h and l from -128 to 127 (lattice.py)."""
    high_T, low_T, integers_T, exponent = _two_bytes(x_T)
    place_T = x_out + token_order(columns_T)
    tl.store(place_T, high_T.to(tl.int8))
    tl.store(place_T + padded, low_T.to(tl.int8))
    # 2^(exponent - 127 - 14), times the 1 / 32 of sums.
    tl.store(steps, (exponent - 19) << 23)
    tl.store(steps + 1, -120 * tl.sum(integers_T, axis=0))


@triton.jit
def output_place(places, block, A: tl.constexpr, B: tl.constexpr):
    """Of a block of outputs: first column of its rotation, blocks of that, offset of its row of Oᵀ, and own column.

    places: int32 [blocks, 4], these numbers, where rotations lie side by side; None for a single one.
    """
    if places is None:
        return 0, A, block * A, block * B
    else:
        place = places + block * 4
        return tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)


@triton.jit
def hadamard_output_kernel(
    y,  # float32 [splits, M, O]
    signs,  # [O]
    outer,  # Oᵀ, float32 [A, A]; of several rotations, one after the other
    places,  # see output_place
    bias,  # [O], or None
    y_out,  # [M, O]
    M,
    N,
    splits: tl.constexpr,
    A: tl.constexpr,  # of the longest rotation
    BLOCK_A: tl.constexpr,
    B: tl.constexpr,
    factor: tl.constexpr,  # 1 / sqrt(B), and the headroom of float16
    pdl: tl.constexpr,
):
    """One block of signs ⊙ Hᵀ y + bias, of the sum of all y."""
    block, m = tl.program_id(0), tl.program_id(1)
    start, blocks, row, column = output_place(places, block, A, B)
    columns_B = column + tl.arange(0, B)
    blocks_A = tl.arange(0, BLOCK_A)
    row_A1 = tl.load(outer + row + blocks_A, mask=blocks_A < blocks, other=0.0)[:, None] * factor
    signs_B = tl.load(signs + columns_B).to(tl.float32)
    if bias is not None:
        bias_B = tl.load(bias + columns_B).to(tl.float32)
    if pdl:
        gdc_wait()
        gdc_launch_dependents()
    place_AB = m.to(tl.int64) * N + start + blocks_A[:, None] * B + tl.arange(0, B)[None, :]
    y_AB = tl.load(y + place_AB, mask=(blocks_A < blocks)[:, None], other=0.0)
    for split in tl.static_range(1, splits):
        y_AB += tl.load(y + split * M * N + place_AB, mask=(blocks_A < blocks)[:, None], other=0.0)
    y_B = _blocks(y_AB, row_A1).reshape(B) * signs_B
    if bias is not None:
        y_B += bias_B
    tl.store(y_out + m.to(tl.int64) * N + columns_B, y_B.to(y_out.dtype.element_ty))
