"""Device functions of rotations whose blocks of 128 or 256 are computed by lanes (ptx.py).

Every warp has 128 values of a program, of which lane l has four: columns 4 l to 4 l + 3. What lanes have are tuples of
tensors, an element a thread.

Shapes: T threads, B values of a block, P blocks of a program.
"""

import triton
import triton.language as tl

from lqer.kernels.lattice.decode import TILE_C
from lqer.kernels.rotations.ptx import (
    finish_asm,
    gated_asm,
    leave_asm,
    load_asm,
    rows_asm,
    squares_asm,
    sum_asm,
    weighted_asm,
)
from lqer.kernels.trellis.byte_sums import uncounted_next
from lqer.kernels.trellis.decode import types
from lqer.kernels.trellis.resident_ptx import reserve_asm


@triton.constexpr_function
def constraints(outputs: str, inputs: str) -> str:
    """Of inline PTX, by a letter for each operand."""
    return ",".join([f"=&{letter}" for letter in outputs] + list(inputs))


@triton.constexpr_function
def element_of(dtype: tl.dtype) -> str:
    return {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[dtype.name]


@triton.constexpr_function
def registers(dtype: tl.dtype, halves: int) -> int:
    """That a lane needs for its values of a block."""
    return halves * (4 if dtype.name == "fp32" else 2)


@triton.jit
def places_of(place_T, stride, splits: tl.constexpr):
    """Addresses of as many partial sums."""
    if splits == 1:
        return (place_T.to(tl.int64),)
    else:
        return (place_T.to(tl.int64),) + places_of(place_T + stride, stride, splits - 1)  # noqa: RUF005


@triton.jit
def load_values(
    values, stride, first_T, blocks, B: tl.constexpr, splits: tl.constexpr, turns: tl.constexpr, by: tl.constexpr
):
    """A lane's values of block first_T and every `by`-th after it, of a token that is the sum of `splits` places."""
    dtype: tl.constexpr = values.dtype.element_ty
    count: tl.constexpr = registers(dtype, B // TILE_C)
    lane_T = tl.arange(0, first_T.shape[0]) % 32
    # Blocks beyond the last are the last again, and multiplied with zero.
    place_T = values + tl.minimum(first_T, blocks - 1) * B + lane_T * 4
    loaded = tl.inline_asm_elementwise(
        load_asm(B // TILE_C, element_of(dtype), splits), constraints("r" * count, "l" * splits),
        places_of(place_T, stride, splits), dtype=types(tl.int32, count), is_pure=False, pack=1,
    )  # fmt: skip
    if turns == 1:
        return loaded
    else:
        return loaded + load_values(values, stride, first_T + by, blocks, B, splits, turns - 1, by)


@triton.jit
def load_rows(rows, first_T, P: tl.constexpr, turns: tl.constexpr, by: tl.constexpr):
    """Elements of the program's rows of O for block first_T and every `by`-th after it."""
    loaded = tl.inline_asm_elementwise(
        rows_asm(P), constraints("f" * P, "l"), [(rows + first_T * P).to(tl.int64)],
        dtype=types(tl.float32, P), is_pure=False, pack=1,
    )  # fmt: skip
    if turns == 1:
        return loaded
    else:
        return loaded + load_rows(rows, first_T + by, P, turns - 1, by)


@triton.jit
def reserve_sums(warps: tl.constexpr):
    """The address of shared memory for the sums of so many warps, and the largest magnitudes of each."""
    return tl.inline_asm_elementwise(
        reserve_asm("sums_of_lanes", 512 * warps * warps + 1024), "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def zeros(first_T, count: tl.constexpr):
    """As many zeros of each thread."""
    if count == 1:
        return (tl.zeros(first_T.shape, tl.float32),)
    else:
        return zeros(first_T, count - 1) + zeros(first_T, 1)


@triton.jit
def weighted(x, signs, weights, offset, dtype: tl.constexpr, B: tl.constexpr, turns: tl.constexpr):
    """x ⊙ signs ⊙ (offset + weights) of a lane in float32, as `load_values` gives it, from what it gives of all."""
    halves: tl.constexpr = B // TILE_C
    count: tl.constexpr = registers(dtype, halves)
    own = tl.inline_asm_elementwise(
        weighted_asm(halves, element_of(dtype)), constraints("r" * 2 * count, "r" * 3 * count + "f"),
        x[:count] + signs[:count] + weights[:count] + (offset,), dtype=types(tl.int32, 2 * count), is_pure=True,
        pack=1,
    )  # fmt: skip
    if turns == 1:
        return own
    else:
        return own + weighted(x[count:], signs[count:], weights[count:], offset, dtype, B, turns - 1)


@triton.jit
def gated(x, signs, up, dtype: tl.constexpr, B: tl.constexpr, turns: tl.constexpr):
    """The same of silu(x) ⊙ signs ⊙ up."""
    halves: tl.constexpr = B // TILE_C
    count: tl.constexpr = registers(dtype, halves)
    own = tl.inline_asm_elementwise(
        gated_asm(halves, element_of(dtype)), constraints("r" * 2 * count, "r" * 3 * count),
        x[:count] + signs[:count] + up[:count], dtype=types(tl.int32, 2 * count), is_pure=True, pack=1,
    )  # fmt: skip
    if turns == 1:
        return own
    else:
        return own + gated(x[count:], signs[count:], up[count:], dtype, B, turns - 1)


@triton.jit
def sum_squares(x, first_T, blocks, dtype: tl.constexpr, B: tl.constexpr, turns: tl.constexpr, by: tl.constexpr):
    """The sum of the squares of what a lane has of a token, from `load_values` of as many turns."""
    halves: tl.constexpr = B // TILE_C
    count: tl.constexpr = registers(dtype, halves)
    squares_T = tl.zeros(first_T.shape, tl.float32)
    for turn in tl.static_range(turns):
        present_T = tl.where(first_T + turn * by < blocks, 1.0, 0.0)
        squares_T = tl.inline_asm_elementwise(
            squares_asm(halves, element_of(dtype)), constraints("f", "f" + "r" * count + "f"),
            (squares_T,) + x[turn * count : turn * count + count] + (present_T,),  # noqa: RUF005
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return squares_T


@triton.jit
def add_blocks(
    x, signs, rows, dtype: tl.constexpr, largest: tl.constexpr, B: tl.constexpr, P: tl.constexpr, turns: tl.constexpr
):
    """What a lane has of the program's sums, and of the token's `largest` magnitude. signs: None if x is float32."""
    halves: tl.constexpr = B // TILE_C
    count: tl.constexpr = registers(dtype, halves)
    inputs: tl.constexpr = dtype != tl.float32
    outputs: tl.constexpr = 4 * halves * P + (1 if largest else 0)
    sums = zeros(rows[0], outputs)
    for turn in tl.static_range(turns):
        operands = sums + x[turn * count : turn * count + count]
        if inputs:
            operands = operands + signs[turn * count : turn * count + count]
        sums = tl.inline_asm_elementwise(
            sum_asm(P, halves, element_of(dtype), largest),
            constraints("f" * outputs, "f" * outputs + "r" * count * (2 if inputs else 1) + "f" * P),
            operands + rows[turn * P : turn * P + P], dtype=types(tl.float32, outputs), is_pure=False, pack=1,
        )  # fmt: skip
    return sums


@triton.jit
def finish_blocks(sums, squares_T, B: tl.constexpr, P: tl.constexpr, largest: tl.constexpr):
    """Four of the program's values for each lane, from what all have, and the largest magnitude: see `finish_asm`.

    squares_T: as of `sum_squares`, or None; then their sum over the token is the last result.
    """
    halves: tl.constexpr = B // TILE_C
    warps: tl.constexpr = P * halves
    count: tl.constexpr = 4 * halves * P
    thread_T = tl.arange(0, 32 * warps)
    lane_T, warp_T = thread_T % 32, thread_T // 32
    room = reserve_sums(warps)
    place_T = room + warp_T * (512 * warps) + lane_T * 16
    place = room + 512 * warps * warps
    of_token: tl.constexpr = largest == "token"
    normed: tl.constexpr = squares_T is not None
    operands = sums[:count] + (place_T,)  # noqa: RUF005
    if of_token or normed:
        operands = operands + (place + warp_T * 4,)  # noqa: RUF005
    if of_token:
        operands = operands + (sums[count].to(tl.int32, bitcast=True),)  # noqa: RUF005
    if normed:
        operands = operands + (squares_T,)  # noqa: RUF005
    tl.inline_asm_elementwise(
        leave_asm(count, of_token, normed),
        constraints("r", "f" * count + "r" + ("r" if of_token or normed else "") + "r" * of_token + "f" * normed),
        operands, dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.debug_barrier()
    block_T = room + warp_T // halves * (512 * halves) + lane_T * 16
    sign_T = 1.0 - 2.0 * (warp_T % halves).to(tl.float32)
    # In a loop of one turn, which the compiler cannot know: where another layout is wanted it would compute the results
    # again in that one, in which lanes have other values.
    outputs: tl.constexpr = 4 + (0 if largest == "" else 1) + (1 if normed else 0)
    values, turn = zeros(lane_T, outputs), 0
    while turn < 1:
        values = tl.inline_asm_elementwise(
            finish_asm(warps, halves, largest, normed), constraints("f" * outputs, "rfr"),
            (block_T, sign_T, place + lane_T * 0), dtype=types(tl.float32, outputs), is_pure=False, pack=1,
        )  # fmt: skip
        turn = uncounted_next(turn)
    return values


@triton.jit
def rounded(values, factor, dtype: tl.constexpr, count: tl.constexpr):
    """As many values of lanes times a factor, of the precision of `dtype`; the largest of some stays the largest."""
    own = ((values[count - 1] * factor).to(dtype).to(tl.float32),)
    if count == 1:
        return own
    else:
        return rounded(values, factor, dtype, count - 1) + own


@triton.jit
def scaled(values, signs, bias, residual, factor: tl.constexpr, count: tl.constexpr):
    """As many outputs of lanes: values times signs and factor, and bias and residual if they are not None."""
    y_T = values[count - 1] * (signs[count - 1] * factor)
    if bias is not None:
        y_T += bias[count - 1]
    if residual is not None:
        y_T += residual[count - 1]
    if count == 1:
        return (y_T,)
    else:
        return scaled(values, signs, bias, residual, factor, count - 1) + (y_T,)  # noqa: RUF005
