"""A weight rounded under learnt ranges (learnt_ranges.py) and the gradient of its scales on a GPU, each in one kernel.

    c = clamp(round(w / s) + z, min_code, max_code)        w_q = (c - z) s
    ∂w_q / ∂s = c - z - w / s within the codes, else c - z        ∂w_q / ∂z = 0 within the codes, else -s

It imports triton: only for tensors on a GPU, or in Triton's interpreter.

Shapes: O out_features, I in_features, N groups of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lqer.formats import Int
from lqer.formats.blocks import block_count, block_width

# Weights of a program; a group that is wider is walked by one.
TILE = 2048
# Adding and subtracting 1.5 * 2^23 rounds a float32 below 2^22 to an integer, ties to even.
ROUNDER = tl.constexpr(12582912.0)
LARGEST_ROUNDED = tl.constexpr(1048576.0)


class FusedRounding(torch.autograd.Function):
    """w_q (O, I), in some float dtype, of a weight and s and z (O, N), all float32; no gradient for the weight."""

    @staticmethod
    def forward(
        ctx: Any, weight_OI: Tensor, step_ON: Tensor, zero_ON: Tensor, number_format: Int, dtype: torch.dtype
    ) -> Tensor:
        step_ON, zero_ON, weight_OI = step_ON.contiguous(), zero_ON.contiguous(), weight_OI.contiguous()
        rounded_OI = torch.empty_like(weight_OI, dtype=dtype)
        grid, arguments, constants = _launch(weight_OI, number_format)
        clipped_weight_kernel[grid](weight_OI, step_ON, zero_ON, rounded_OI, *arguments, **constants)
        ctx.save_for_backward(weight_OI, step_ON, zero_ON)
        ctx.number_format = number_format
        return rounded_OI

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, None, None]:
        weight_OI, step_ON, zero_ON = ctx.saved_tensors
        step_gradient_ON, zero_gradient_ON = torch.empty_like(step_ON), torch.empty_like(zero_ON)
        grid, arguments, constants = _launch(weight_OI, ctx.number_format)
        clipped_gradient_kernel[grid](
            gradients[0].contiguous(), weight_OI, step_ON, zero_ON, step_gradient_ON, zero_gradient_ON,
            *arguments, **constants,
        )  # fmt: skip
        return None, step_gradient_ON, zero_gradient_ON, None, None


def _launch(
    weight_OI: Tensor, number_format: Int
) -> tuple[tuple[int, int], tuple[int, int, int, int, int], dict[str, int]]:
    """The grid, the kernels' numbers and their constants."""
    rows, columns = weight_OI.shape
    width, count = block_width(columns, number_format.block_size), block_count(columns, number_format.block_size)
    across = min(triton.next_power_of_2(width), TILE)
    grid = rows, triton.cdiv(count, TILE // across)
    arguments = columns, width, count, number_format.min_code, number_format.max_code
    return grid, arguments, {"GROUPS": TILE // across, "ACROSS": across}


@triton.jit
def clipped_weight_kernel(
    weight, step, zero, rounded, columns, width, count, min_code, max_code, GROUPS: tl.constexpr, ACROSS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    step_N = tl.load(step + row * count + n, mask=n < count, other=1.0)
    zero_N = tl.load(zero + row * count + n, mask=n < count, other=0.0)
    for first in range(0, width, ACROSS):
        within = first + tl.arange(0, ACROSS)
        column = n[:, None] * width + within[None, :]
        present = (within[None, :] < width) & (column < columns)
        _, code = _steps_and_code(weight + row * columns + column, step_N, zero_N, present)
        value = (tl.minimum(tl.maximum(code, min_code), max_code) - zero_N[:, None]) * step_N[:, None]
        tl.store(rounded + row * columns + column, value.to(rounded.dtype.element_ty), mask=present)


@triton.jit
def clipped_gradient_kernel(
    gradient, weight, step, zero, step_gradient, zero_gradient, columns, width, count, min_code, max_code,
    GROUPS: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    step_N = tl.load(step + row * count + n, mask=n < count, other=1.0)
    zero_N = tl.load(zero + row * count + n, mask=n < count, other=0.0)
    of_step_N, of_zero_N = tl.zeros((GROUPS,), tl.float32), tl.zeros((GROUPS,), tl.float32)
    for first in range(0, width, ACROSS):
        within = first + tl.arange(0, ACROSS)
        column = n[:, None] * width + within[None, :]
        present = (within[None, :] < width) & (column < columns)
        steps, code = _steps_and_code(weight + row * columns + column, step_N, zero_N, present)
        upstream = tl.load(gradient + row * columns + column, mask=present, other=0.0).to(tl.float32)
        is_within = (code >= min_code) & (code <= max_code)
        centred = tl.minimum(tl.maximum(code, min_code), max_code) - zero_N[:, None]
        of_step_N += tl.sum(upstream * (centred - tl.where(is_within, steps, 0.0)), axis=1)
        of_zero_N += tl.sum(tl.where(is_within, 0.0, upstream), axis=1)
    tl.store(step_gradient + row * count + n, of_step_N, mask=n < count)
    tl.store(zero_gradient + row * count + n, -step_N * of_zero_N, mask=n < count)


@triton.jit
def _steps_and_code(weight, step_N, zero_N, present):
    """The steps w / s and the code round(w / s) + z."""
    w = tl.load(weight, mask=present, other=0.0)
    steps = tl.math.div_rn(w, tl.broadcast_to(step_N[:, None], w.shape))
    bounded = tl.minimum(tl.maximum(steps, -LARGEST_ROUNDED), LARGEST_ROUNDED)
    return steps, (bounded + ROUNDER) - ROUNDER + zero_N[:, None]
