"""The soft weight of `soft.py` and its gradient on a GPU, each in one kernel.

In PyTorch both take some twenty passes over memory, a third of the time of a step; here each weight is read and written
once. It imports triton: only for tensors on a GPU, or in Triton's interpreter.

Shapes: O out_features, I in_features, N groups of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lqer.formats.blocks import block_count, block_width
from lqer.rounding.rectified import STRETCH_HIGH, STRETCH_LOW

if TYPE_CHECKING:
    from lqer.rounding.soft import Grid

# Weights of a program; a group that is wider is walked by one.
TILE = 2048
LOW_C, SPAN_C = tl.constexpr(STRETCH_LOW), tl.constexpr(STRETCH_HIGH - STRETCH_LOW)


class FusedSoftWeight(torch.autograd.Function):
    """(clamp(lower + h(v), min_code, max_code) - z) s of v (O, I) and s (O, N), both float32, in some float dtype."""

    @staticmethod
    def forward(ctx: Any, v_OI: Tensor, step_ON: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
        step_ON = step_ON.contiguous()
        weight_OI = torch.empty_like(v_OI, dtype=dtype)
        soft_weight_kernel[_launch(grid)](
            v_OI, grid.lower_OI, step_ON, grid.zero_ON, weight_OI, *_arguments(grid), **_constants(grid)
        )
        ctx.save_for_backward(v_OI, step_ON)
        ctx.grid = grid
        return weight_OI

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        v_OI, step_ON = ctx.saved_tensors
        grid: Grid = ctx.grid
        v_gradient_OI, step_gradient_ON = torch.empty_like(v_OI), torch.empty_like(step_ON)
        soft_gradient_kernel[_launch(grid)](
            gradients[0].contiguous(), v_OI, grid.lower_OI, step_ON, grid.zero_ON, v_gradient_OI, step_gradient_ON,
            *_arguments(grid), **_constants(grid),
        )  # fmt: skip
        return v_gradient_OI, step_gradient_ON, None, None


def _arguments(grid: Grid) -> tuple[int, int, int, int, int]:
    columns, block_size = grid.lower_OI.shape[1], grid.start.format.block_size
    width, count = block_width(columns, block_size), block_count(columns, block_size)
    return columns, width, count, grid.spacing.min_code, grid.spacing.max_code


def _constants(grid: Grid) -> dict[str, int]:
    width = block_width(grid.lower_OI.shape[1], grid.start.format.block_size)
    across = min(triton.next_power_of_2(width), TILE)
    return {"GROUPS": TILE // across, "ACROSS": across}


def _launch(grid: Grid) -> tuple[int, int]:
    rows, columns = grid.lower_OI.shape
    return rows, triton.cdiv(block_count(columns, grid.start.format.block_size), _constants(grid)["GROUPS"])


@triton.jit
def soft_weight_kernel(
    v, lower, step, zero, weight, columns, width, count, min_code, max_code, GROUPS: tl.constexpr, ACROSS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    step_N = tl.load(step + row * count + n, mask=n < count, other=0.0)
    zero_N = tl.load(zero + row * count + n, mask=n < count, other=0.0)
    for first in range(0, width, ACROSS):
        within = first + tl.arange(0, ACROSS)
        column = n[:, None] * width + within[None, :]
        present = (within[None, :] < width) & (column < columns)
        raised, _, _ = _raised(v, lower, row * columns + column, present)
        code = tl.minimum(tl.maximum(raised, min_code), max_code)
        value = (code - zero_N[:, None]) * step_N[:, None]
        tl.store(weight + row * columns + column, value.to(weight.dtype.element_ty), mask=present)


@triton.jit
def soft_gradient_kernel(
    gradient, v, lower, step, zero, v_gradient, step_gradient, columns, width, count, min_code, max_code,
    GROUPS: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    step_N = tl.load(step + row * count + n, mask=n < count, other=0.0)
    zero_N = tl.load(zero + row * count + n, mask=n < count, other=0.0)
    sum_N = tl.zeros((GROUPS,), tl.float32)
    for first in range(0, width, ACROSS):
        within = first + tl.arange(0, ACROSS)
        column = n[:, None] * width + within[None, :]
        present = (within[None, :] < width) & (column < columns)
        raised, sigmoid, moves = _raised(v, lower, row * columns + column, present)
        moves = moves & (raised >= min_code) & (raised <= max_code)
        code = tl.minimum(tl.maximum(raised, min_code), max_code)
        of_weight = tl.load(gradient + row * columns + column, mask=present, other=0.0).to(tl.float32)
        sum_N += tl.sum(of_weight * (code - zero_N[:, None]), axis=1)
        slope = tl.where(moves, sigmoid * (1 - sigmoid) * SPAN_C, 0.0)
        tl.store(v_gradient + row * columns + column, of_weight * step_N[:, None] * slope, mask=present)
    tl.store(step_gradient + row * count + n, sum_N, mask=n < count)


@triton.jit
def _raised(v, lower, place, present):
    """The code lower + h(v), the sigmoid of v, and whether h has a slope there."""
    v_ = tl.load(v + place, mask=present, other=0.0)
    sigmoid = 1 / (1 + tl.exp(-v_))
    raised = sigmoid * SPAN_C + LOW_C
    moves = (raised >= 0) & (raised <= 1)
    lower_code = tl.load(lower + place, mask=present, other=0).to(tl.float32)
    return lower_code + tl.minimum(tl.maximum(raised, 0.0), 1.0), sigmoid, moves
