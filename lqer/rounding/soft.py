"""A weight between its two neighbours on a grid: the rounding variable of adaptive rounding.

With the step s and the zero point z of a group frozen, a weight w has the lower code floor(w / s + z) and the fraction
f = w / s + z - floor(w / s + z); z is an integer, or -1/2 for mid-rise levels. A rounding variable v moves it between
the lower code and the next one, and a scale variable u stretches the step with which its group is read back
(dequantization-scale tuning, DST):

    h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)                    rectified sigmoid (rectified.py)
    w'   = (clamp(lower + h(v), min_code, max_code) - z) s 2 h(u)

v starts where h(v) = f and u at 0, so w' = w within the range of the grid. v = +inf or -inf stands for a decision: h
is exactly 1 or 0 there and has no gradient. A weight beyond the codes, where both roundings are the same code, is
decided from the start.

Shapes: O out_features, I in_features, N groups of a row, B values of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lqer.formats import Int, QuantizedTensor
from lqer.formats.blocks import from_blocks, to_blocks
from lqer.formats.spacing import Spacing
from lqer.rounding.rectified import (
    STRETCH_HIGH,
    STRETCH_LOW,
    dequantization_scale,
    inverse_rectified_sigmoid,
    rectified_sigmoid,
)

NEAREST = 0.49  # steps from a code within which it is the nearest one
SMALLEST_STEP = torch.finfo(torch.float32).smallest_normal  # the step of MXINT's zero blocks is too small to divide by


def harden(v: Tensor, most_soft: int) -> Tensor:
    """Decide a layer's surest elements, those with the largest |h(v) - 0.5|; at most `most_soft` stay soft.

    A decided element becomes +inf where h(v) > 0.5, else -inf. Elements that tie with the last decided one are decided
    too.
    """
    score = (rectified_sigmoid(v) - 0.5).abs_()
    if most_soft >= v.numel():
        return v.clone()
    threshold = _in_order(score.flatten(), most_soft)
    return torch.where(score >= threshold, torch.where(v > 0, torch.inf, -torch.inf), v)


def _in_order(x: Tensor, position: int) -> Tensor:
    """The element at `position` of sorted x."""
    # On a GPU, sorting 45 million values takes a twentieth of the time of kthvalue.
    return x.sort().values[position] if x.is_cuda else x.kthvalue(position + 1).values


@dataclass(frozen=True)
class Grid:
    """The codes that a weight (O, I) can take under the scales and zero points of `start`."""

    start: QuantizedTensor
    lower_OI: Tensor  # int16: floor(w / s + z), clamped where no rounding reaches the format's codes
    fraction_OI: Tensor  # float32 in [0, 1)
    spacing: Spacing  # of groups [O, N]

    @classmethod
    def of(cls, weight_OI: Tensor, start: QuantizedTensor, keep_codes: bool = False) -> Grid:
        """The grid of a float weight (O, I) under the scales of `start`, a tensor of its shape with groups along I.

        keep_codes: w is first moved next to the code of `start`, less than half a step from it, so that this code is
        the nearest one.

        Raises ValueError for a format whose codes are not evenly spaced and for a start of another shape.
        """
        spacing = _spacing(start)
        if start.shape != tuple(weight_OI.shape) or start.axis != 1:
            raise ValueError(
                f"the start has shape {start.shape} and groups along axis {start.axis}; "
                f"a weight of shape {tuple(weight_OI.shape)} needs its own shape and groups along axis 1"
            )
        weight_ONB = to_blocks(weight_OI.detach().to(torch.float32), start.format.block_size)
        steps_ONB = weight_ONB / spacing.step_G.clamp(min=SMALLEST_STEP).unsqueeze(-1)
        # A whole zero point is added after the floor, where the sum is exact.
        whole_ON = spacing.zero_G.ceil()
        steps_ONB.add_((spacing.zero_G - whole_ON).unsqueeze(-1))
        if keep_codes:
            code_ONB = to_blocks(start.parts["codes"].to(torch.float32), start.format.block_size)
            code_ONB -= whole_ON.unsqueeze(-1)
            steps_ONB = steps_ONB.clamp(code_ONB - NEAREST, code_ONB + NEAREST)
        floor_ONB = steps_ONB.floor()
        lower_ONB = (floor_ONB + whole_ON.unsqueeze(-1)).clamp_(spacing.min_code - 1, spacing.max_code)
        length = weight_OI.shape[1]
        lower_OI = from_blocks(lower_ONB.to(torch.int16), length)
        return cls(start, lower_OI, from_blocks(steps_ONB.sub_(floor_ONB), length), spacing)

    @property
    def is_open_OI(self) -> Tensor:
        """Where the two roundings are two codes, bool."""
        return (self.lower_OI >= self.spacing.min_code) & (self.lower_OI < self.spacing.max_code)

    @property
    def start_v_OI(self) -> Tensor:
        """The v at which w' = w within the range of the grid; decided where the weight is beyond the codes."""
        decided_OI = torch.where(self.lower_OI < self.spacing.min_code, torch.inf, -torch.inf)
        return torch.where(self.is_open_OI, inverse_rectified_sigmoid(self.fraction_OI), decided_OI)

    @property
    def tunes_scales(self) -> bool:
        """Whether a group's scale can be stretched; the scales of MXINT are powers of two."""
        return isinstance(self.start.format, Int)

    @cached_property
    def zero_ON(self) -> Tensor:
        """The zero point of every group, float32, contiguous."""
        return self.spacing.zero_G.expand_as(self.spacing.step_G).contiguous()

    def weight(self, v_OI: Tensor, u_ON: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The soft weight w' (O, I), differentiable in both variables; without u the step is s.

        The stretched step is rounded to the dtype it is stored in (straight-through gradient), so that training uses
        the scales that are stored. dtype: that of w', which is computed in float32.
        """
        step_ON = self.spacing.step_G if u_ON is None else self._stretched(u_ON)
        if v_OI.is_cuda:
            from lqer.rounding.soft_kernel import FusedSoftWeight

            return FusedSoftWeight.apply(v_OI, step_ON, self, dtype)
        return _SoftWeight.apply(v_OI, step_ON, self).to(dtype)

    @torch.no_grad()
    def quantized(self, v_OI: Tensor, u_ON: Tensor | None) -> QuantizedTensor:
        """The codes with every v decided (0 rounds down) and the scales as stretched: `weight` of that, bit for bit."""
        raised_OI = self.lower_OI + (v_OI > 0).to(torch.int16)
        codes_OI = raised_OI.clamp_(self.spacing.min_code, self.spacing.max_code)
        parts = self.start.parts | {"codes": codes_OI.to(self.start.parts["codes"].dtype)}
        if u_ON is not None:
            parts["scales"] = self._stretched(u_ON).to(parts["scales"].dtype)
        return QuantizedTensor(self.start.format, self.start.shape, self.start.axis, parts)

    def _stretched(self, u_ON: Tensor) -> Tensor:
        number_format = self.start.format
        if not isinstance(number_format, Int):
            raise ValueError(f"the scales of {number_format.kind} are powers of two: they cannot be stretched")
        stretched_ON = self.spacing.step_G * dequantization_scale(u_ON)
        stored_ON = number_format.storable_scales(stretched_ON.detach()).to(torch.float32)
        # The bracket is exactly 0 in the forward pass: the stored value is unchanged to the last bit.
        return stored_ON + (stretched_ON - stretched_ON.detach())


class _SoftWeight(torch.autograd.Function):
    """(clamp(lower + h(v), min_code, max_code) - z) s with an explicit gradient: half of autograd's time and memory."""

    @staticmethod
    def forward(ctx: Any, v_OI: Tensor, step_ON: Tensor, grid: Grid) -> Tensor:
        spacing = grid.spacing
        centred_OI = rectified_sigmoid(v_OI).add_(grid.lower_OI).clamp_(spacing.min_code, spacing.max_code)
        centred_ONB = to_blocks(centred_OI, grid.start.format.block_size).sub_(spacing.zero_G.unsqueeze(-1))
        ctx.save_for_backward(v_OI, step_ON, centred_ONB)
        ctx.grid = grid
        return from_blocks(centred_ONB * step_ON.unsqueeze(-1), v_OI.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        v_OI, step_ON, centred_ONB = ctx.saved_tensors
        gradient_ONB = to_blocks(gradients[0], ctx.grid.start.format.block_size)
        step_gradient_ON = (gradient_ONB * centred_ONB).sum(-1)
        gradient_OI = from_blocks(gradient_ONB * step_ON.unsqueeze(-1), v_OI.shape[1])
        sigmoid_OI = torch.sigmoid(v_OI)
        gradient_OI.mul_(sigmoid_OI).mul_(1 - sigmoid_OI).mul_(STRETCH_HIGH - STRETCH_LOW)
        raised_OI = sigmoid_OI.mul_(STRETCH_HIGH - STRETCH_LOW).add_(STRETCH_LOW)
        moves_OI = (raised_OI >= 0) & (raised_OI <= 1)
        raised_OI.add_(ctx.grid.lower_OI)
        moves_OI &= (raised_OI >= ctx.grid.spacing.min_code) & (raised_OI <= ctx.grid.spacing.max_code)
        return gradient_OI.mul_(moves_OI), step_gradient_ON, None


def _spacing(start: QuantizedTensor) -> Spacing:
    spacing = start.format.spacing(start.parts)
    if spacing is None:
        raise ValueError(f"adaptive rounding needs weights of kind int or mxint, found {start.format}")
    return spacing
