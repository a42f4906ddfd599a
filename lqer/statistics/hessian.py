"""The Hessian H = E[x xᵀ] of a linear's inputs: the mean over all tokens, not centred.

An error E of the weight costs E‖E x‖² = tr(E H Eᵀ) at the layer's output, so 2 H is the Hessian of the layer's squared
output error with respect to each row of the weight. Where tokens have weights, H = Σ w_t x_t x_tᵀ / Σ w_t.

Shapes: I in_features, N tokens of a batch, P rows of a panel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lqer.statistics.base import Allocator, InputRotation, Statistic

# Tokens whose products are summed in float32 before the sum is added to a float64 one.
CHUNK_TOKENS = 512
PANEL_ROWS = 512


class HessianAccumulator:
    """Σ w x xᵀ in float64."""

    def __init__(self, in_features: int, device: torch.device, offload: Allocator):
        self._sum_II = offload.zeros([in_features, in_features], torch.float64, device)
        self._total: float | Tensor = 0

    def add(self, x_NI: Tensor, original_NI: Tensor | None, sampled_N: Tensor, weights_N: Tensor | None = None) -> None:
        self._total = self._total + total_weight(x_NI, weights_N)
        if weights_N is not None:
            x_NI = multiplicand(x_NI.to(torch.float32) * weights_N.sqrt().unsqueeze(-1), x_NI.dtype)
        for chunk_NI in x_NI.split(CHUNK_TOKENS):
            add_float32(self._sum_II, outer_products(chunk_NI))

    def result(self) -> Tensor:
        return _symmetric_mean(self._sum_II, self._total)


def total_weight(x_NI: Tensor, weights_N: Tensor | None) -> int | Tensor:
    """What the tokens of a batch count together; a float64 scalar, or their number where they have no weights."""
    return len(x_NI) if weights_N is None else weights_N.to(torch.float64).sum()


def multiplicand(x_NI: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 values as they are multiplied by inputs of that dtype: rounded to it if it is bfloat16, which is fast.

    The rounding averages out over the tokens. In float16 weighted values would underflow.
    """
    return x_NI.to(dtype) if dtype == torch.bfloat16 else x_NI


def outer_products(x_NI: Tensor, y_NI: Tensor | None = None) -> Tensor:
    """Σ x yᵀ, float32 (I, I); Σ x xᵀ by default.

    Products of two bfloat16 or float16 numbers are exact in float32, and a GPU's half-precision units accumulate them
    in float32.
    """
    y_NI = x_NI if y_NI is None else y_NI
    if x_NI.is_cuda and x_NI.dtype == y_NI.dtype and x_NI.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x_NI.T, y_NI, out_dtype=torch.float32)
    return x_NI.to(torch.float32).T @ y_NI.to(torch.float32)


def add_float32(sum_II: Tensor, products_II: Tensor) -> None:
    """Add float32 to float64 in place; by panels of rows, because a CPU first widens the whole operand."""
    for sum_PI, products_PI in zip(sum_II.split(PANEL_ROWS), products_II.split(PANEL_ROWS), strict=True):
        sum_PI += products_PI


def _symmetric_mean(sum_II: Tensor, total: float | Tensor) -> Tensor:
    """(S + Sᵀ) / 2 total, float32: a matrix product need not be symmetric to the last bit.

    By panels of rows: a second matrix in float64 would be larger than a large block's weights.
    """
    mean_II = torch.empty(sum_II.shape, dtype=torch.float32, device=sum_II.device)
    for first in range(0, len(sum_II), PANEL_ROWS):
        rows = slice(first, first + PANEL_ROWS)
        mean_II[rows] = (sum_II[rows] + sum_II[:, rows].T) / (2 * total)
    return mean_II


@dataclass(frozen=True)
class Hessian(Statistic):
    """E[x xᵀ], float32 (I, I), symmetric to the last bit."""

    kind = "hessian"
    weights_tokens: ClassVar[bool] = True

    def accumulator(self, in_features: int, device: torch.device, offload: Allocator) -> HessianAccumulator:
        return HessianAccumulator(in_features, device, offload)

    def nbytes(self, in_features: int) -> int:
        return 8 * in_features**2

    def result_nbytes(self, in_features: int) -> int:
        return 4 * in_features**2

    @property
    def rotates_from(self) -> Hessian:
        return self

    def rotated(self, value: Tensor, rotation: InputRotation) -> Tensor:
        """V H Vᵀ in float64."""
        return rotation.hessian(value.to(torch.float64))
