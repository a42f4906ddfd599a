"""One token, MXINT4 weights, MXINT activations: the product in integers, exact within every block.

A block contributes 2^(e_w + e_x) * sum (u - 8) * k with four-bit u and eight-bit k (u - 7.5 for mid-rise levels): one
dp4a instruction multiplies and adds four of them. Neither shared memory nor tensor cores are used.

    prepare   x -> codes, steps, sums per word; x_q A
    gemv      y = W_q x_q + b + Q(Q(x_q A) B), whole rows of W per program

A weight word holds even or odd columns of a block (layout/codes.py); masked with 0x0F0F0F0F it yields every second
code. The codes of x are arranged to match: for each weight word there are two words of four codes, first those for the
low nibbles of all words of a tile, then those for the high nibbles. In the loop every tensor has one element per weight
word, so no value moves between threads. The first kernel writes one buffer of 32-bit words:

    codes   IP / 4 words of four bytes each
    steps   IP / 8 float32, the step of x for each weight word
    sums    IP / 8 int32, -8 times the sum of the codes that a weight word is multiplied with
    x_q A   RP float32

Shapes: I in_features, O out_features, M one token, R rank, T tiles at once, B blocks of a tile, W words. A column of a
block is Y byte, H high nibble or low, P odd column or even.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lqer.kernels.decode import ROWS_C, WORDS_C, exponent_to_scale
from lqer.kernels.low_rank import first_rank_of, load_factor, project_rank
from lqer.kernels.rounding import mxint_codes, round_columns
from lqer.kernels.runtime import INTERPRETED

BLOCKS = tl.constexpr(8)  # of a tile
TILE_K = tl.constexpr(128)
OFFSET = tl.constexpr(8)


@triton.jit
def _as_floats(words):
    return tl.cast(words, tl.pointer_type(tl.float32), bitcast=True)


@triton.jit
def _as_bytes(words):
    return tl.cast(words, tl.pointer_type(tl.int8), bitcast=True)


@triton.jit
def prepare_vector_kernel(
    x,  # [1, I]
    a_codes,  # Aᵀ [RP, IP] int8 or plain, or None
    a_exponents,  # [RP, IP / a_block] uint8, or None
    vector,  # output, int32 [IP / 2 + RP], see above
    K,
    rank: tl.constexpr,
    tiles: tl.constexpr,
    rounding: tl.constexpr,
    a_block: tl.constexpr,
    TILES: tl.constexpr,  # of a program
    BLOCK_K: tl.constexpr,
    pdl: tl.constexpr,
):
    """The first `rank` programs compute one element of x_q A each; the others arrange TILES tiles of x each."""
    pid = tl.program_id(0)
    if rank == 0:
        _arrange(x, vector, pid, K, tiles, rounding, TILES, pdl)
    elif pid < rank:
        padded: tl.constexpr = tiles * TILE_K
        place = _as_floats(vector + padded // 2) + pid
        project_rank(x, a_codes, a_exponents, place, pid, K, padded, rounding, a_block, BLOCK_K, pdl)
    else:
        _arrange(x, vector, pid - rank, K, tiles, rounding, TILES, pdl)


@triton.jit
def _arrange(
    x,
    vector,
    program,
    K,
    tiles: tl.constexpr,
    rounding: tl.constexpr,
    TILES: tl.constexpr,
    pdl: tl.constexpr,
):
    """Write codes, steps and sums of TILES tiles."""
    if pdl:
        gdc_wait()
        gdc_launch_dependents()
    size: tl.constexpr = TILES * TILE_K
    padded: tl.constexpr = tiles * TILE_K
    columns = program * size + tl.arange(0, size)
    x_T = tl.load(x + columns, mask=columns < K, other=0.0).to(tl.float32)
    codes, steps = mxint_codes(x_T.reshape(size // rounding.block, rounding.block), 1, rounding)
    # Column 4 y + 2 h + p of a block is multiplied with nibble 2 y + h of the block's word p.
    codes_TBYHP = codes.reshape(TILES, BLOCKS, 4, 2, 2)
    bytes_THBPY = codes_TBYHP.permute(0, 3, 1, 4, 2).to(tl.int8)
    tl.store(_as_bytes(vector) + columns, bytes_THBPY.reshape(size), mask=columns < padded)
    word = program * TILES * WORDS_C + tl.arange(0, TILES * WORDS_C)
    inside_words = word < tiles * WORDS_C
    steps_W = steps.reshape(size // rounding.block, 1).broadcast_to(size // rounding.block, rounding.block // 8)
    tl.store(_as_floats(vector + padded // 4) + word, steps_W.reshape(TILES * WORDS_C), mask=inside_words)
    sums_W = tl.sum(tl.sum(codes_TBYHP, axis=2), axis=2).to(tl.int32).reshape(TILES * WORDS_C)
    tl.store(vector + padded // 4 + padded // 8 + word, sums_W * (-OFFSET), mask=inside_words)


@triton.jit
def _products(words, low, high, sums):
    """`sums` + the dot products of each word's low nibbles with the bytes of `low` and of its high ones with `high`."""
    if INTERPRETED:
        for i in tl.static_range(4):
            sums += ((words >> (8 * i)) & 15) * ((low << (24 - 8 * i)) >> 24)
            sums += ((words >> (8 * i + 4)) & 15) * ((high << (24 - 8 * i)) >> 24)
        return sums
    else:
        return tl.inline_asm_elementwise(
            """
                {
                .reg .b32 low, high, sum;
                and.b32 low, $1, 0x0F0F0F0F;
                shr.u32 high, $1, 4;
                and.b32 high, high, 0x0F0F0F0F;
                dp4a.u32.s32 sum, low, $2, $4;
                dp4a.u32.s32 $0, high, $3, sum;
                }
                """,
            "=r,r,r,r,r",
            [words, low, high, sums],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _load_tiles(words, exponents, rows_O, first, tiles: tl.constexpr, per_tile: tl.constexpr, BLOCK_T: tl.constexpr):
    """Words [O, T, 16] and exponents [O, T, per_tile] of the tiles from `first` on; zeros beyond the last tile."""
    tile = (first + tl.arange(0, BLOCK_T))[None, :, None]
    inside = tile < tiles
    group = (rows_O // ROWS_C) * (tiles * ROWS_C) + rows_O % ROWS_C
    row = group[:, None, None] + tile * ROWS_C
    w = tl.load(words + row * WORDS_C + tl.arange(0, WORDS_C)[None, None, :], mask=inside, other=0)
    e = tl.load(exponents + row * per_tile + tl.arange(0, per_tile)[None, None, :], mask=inside, other=0)
    return w, e


@triton.jit
def gemv_kernel(
    words,  # as in layout/codes.py
    exponents,  # uint8, its scales
    bias,  # [O], or None
    vector,  # int32 [IP / 2 + RP], from prepare_vector_kernel; RP is that of all segments
    b_codes,  # [own rank, O] int8 or values, or None
    b_exponents,  # [own rank / b_block, O] uint8, or None
    segments,  # int32 [O / 64], see joint.py, or None
    residual,  # [1, O], or None
    y,  # [1, O]
    N,
    rank: tl.constexpr,  # of one segment
    tiles: tl.constexpr,
    per_tile: tl.constexpr,  # exponents of a row in a tile
    mid_rise: tl.constexpr,  # a code u stands for u - 7.5, not u - 8
    rounding: tl.constexpr,
    b_block: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    pdl: tl.constexpr,
):
    """y of BLOCK_N rows, over all of K."""
    rows_O = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    word_W = tl.arange(0, WORDS_C)[None, None, :]
    padded: tl.constexpr = tiles * TILE_K
    shape: tl.constexpr = (BLOCK_N, BLOCK_T, WORDS_C)
    # Weights do not depend on the previous kernel: prefetch the first ones while it still runs.
    w, e = _load_tiles(words, exponents, rows_O, 0, tiles, per_tile, BLOCK_T)
    if rank > 0:
        b_RO = load_factor(b_codes, b_exponents, 0, rows_O, N, rank, rank, b_block, tl.float32)
        first_rank = first_rank_of(segments, tl.program_id(0) * BLOCK_N, rank)
    if pdl:
        gdc_wait()
        # The next kernel may start now and prefetch its weights.
        gdc_launch_dependents()
    # Loaded here to hide their latency behind the product.
    if residual is not None:
        residual_O = tl.load(residual + rows_O, mask=rows_O < N, other=0.0)
    if rank > 0:
        xa_MR = tl.load(_as_floats(vector + padded // 2) + first_rank + tl.arange(0, rank)).reshape(1, rank)
    acc = tl.zeros(shape, tl.float32)
    for first in range(0, tiles, BLOCK_T):
        next_w, next_e = _load_tiles(words, exponents, rows_O, first + BLOCK_T, tiles, per_tile, BLOCK_T)
        tile = (first + tl.arange(0, BLOCK_T))[None, :, None]
        inside = tile < tiles
        # Every row loads x again, from the cache, so that x is distributed over threads as w is.
        x_word = (tile * WORDS_C + word_W).broadcast_to(shape)
        low = tl.load(vector + x_word + tile * WORDS_C, mask=inside, other=0)
        high = tl.load(vector + x_word + tile * WORDS_C + WORDS_C, mask=inside, other=0)
        step = tl.load(_as_floats(vector + padded // 4) + x_word, mask=inside, other=0.0)
        sums = tl.load(vector + padded // 4 + padded // 8 + x_word, mask=inside, other=0)
        scale = exponent_to_scale(e, tl.float32)[:, :, :, None]
        scale = scale.broadcast_to(BLOCK_N, BLOCK_T, per_tile, WORDS_C // per_tile).reshape(shape)
        products = _products(w, low, high, sums).to(tl.float32)
        if mid_rise:
            # Half of the sum of the codes of x, exactly.
            products -= sums.to(tl.float32) * (0.5 / OFFSET)
        acc += products * (scale * step)
        w, e = next_w, next_e
    y_O = tl.sum(tl.sum(acc, axis=2), axis=1)
    if rank > 0:
        xa_R = round_columns(xa_MR, rounding).reshape(rank)
        product_O = tl.sum(xa_R[:, None] * b_RO, axis=0)
        y_O += round_columns(product_O.reshape(1, BLOCK_N), rounding).reshape(BLOCK_N)
    if bias is not None:
        y_O += tl.load(bias + rows_O, mask=rows_O < N, other=0.0).to(tl.float32)
    if residual is not None:
        y_O += residual_O.to(tl.float32)
    tl.store(y + rows_O, y_O.to(y.dtype.element_ty), mask=rows_O < N)
