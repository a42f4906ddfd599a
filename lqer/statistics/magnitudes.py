"""Magnitudes of a linear's inputs, channel by channel.

For rotated inputs x' = V x the Hessian V H Vᵀ is known, and E[x_i'²] is its diagonal. E|x_i'| is taken as sqrt(2/π)
times the root of that: every x_i' is a weighted sum over all channels of x, and so nearly normal. The largest |x_i'|
does not follow.

Shapes: I in_features, N tokens of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lqer.statistics.base import Allocator, InputRotation, Statistic
from lqer.statistics.gang import Gang, add_up, largest
from lqer.statistics.hessian import Hessian, total_weight


def _sum_abs(x_NI: Tensor) -> Tensor:
    """Σ |x_i|, float32 (I,)."""
    if x_NI.is_cuda:
        return torch.linalg.vector_norm(x_NI, 1, dim=0, dtype=torch.float32)
    # On a CPU two passes are several times faster than a norm along the columns.
    return x_NI.to(torch.float32).abs().sum(0)


def _sum_squares(x_NI: Tensor, weights_N: Tensor | None) -> Tensor:
    """Σ w x_i², float32 (I,)."""
    if x_NI.is_cuda and weights_N is None:
        return torch.linalg.vector_norm(x_NI, 2, dim=0, dtype=torch.float32).square()
    square_NI = x_NI.to(torch.float32).square()
    if weights_N is not None:
        square_NI *= weights_N.unsqueeze(-1)
    return square_NI.sum(0)


class MeanAbsAccumulator:
    """The largest of the batches' means of |x_i|, float32."""

    def __init__(self, in_features: int, device: torch.device, offload: Allocator):
        self._mean_abs_I = offload.zeros([in_features], torch.float32, device)

    def add(self, x_NI: Tensor, original_NI: Tensor | None, sampled_N: Tensor, weights_N: Tensor | None = None) -> None:
        self._mean_abs_I = torch.maximum(self._mean_abs_I, _sum_abs(x_NI) / len(x_NI))

    def join(self, gang: Gang) -> None:
        self._mean_abs_I = largest(gang.gathered(self._mean_abs_I))

    def result(self) -> Tensor:
        return self._mean_abs_I


class MeanSquareAccumulator:
    """Σ w x_i² in float64."""

    def __init__(self, in_features: int, device: torch.device, offload: Allocator):
        self._sum_I = offload.zeros([in_features], torch.float64, device)
        self._total: float | Tensor = 0

    def add(self, x_NI: Tensor, original_NI: Tensor | None, sampled_N: Tensor, weights_N: Tensor | None = None) -> None:
        self._sum_I += _sum_squares(x_NI, weights_N).to(torch.float64)
        self._total = self._total + total_weight(x_NI, weights_N)

    def join(self, gang: Gang) -> None:
        gang.sum_(self._sum_I)
        self._total = add_up(gang.gathered(self._total))

    def result(self) -> Tensor:
        return (self._sum_I / self._total).to(torch.float32)


class MaxAbsAccumulator:
    """The largest |x_i| so far, float32."""

    def __init__(self, in_features: int, device: torch.device, offload: Allocator):
        self._max_abs_I = offload.zeros([in_features], torch.float32, device)

    def add(self, x_NI: Tensor, original_NI: Tensor | None, sampled_N: Tensor, weights_N: Tensor | None = None) -> None:
        self._max_abs_I = torch.maximum(self._max_abs_I, x_NI.to(torch.float32).abs().amax(0))

    def join(self, gang: Gang) -> None:
        self._max_abs_I = largest(gang.gathered(self._max_abs_I))

    def result(self) -> Tensor:
        return self._max_abs_I


@dataclass(frozen=True)
class MeanAbs(Statistic):
    """The maximum over batches of the mean of |x_i| over a batch's tokens, float32 (I,) (LQER, arXiv 2402.02446)."""

    kind = "mean_abs"

    def accumulator(self, in_features: int, device: torch.device, offload: Allocator) -> MeanAbsAccumulator:
        return MeanAbsAccumulator(in_features, device, offload)

    def nbytes(self, in_features: int) -> int:
        return 4 * in_features

    @property
    def rotates_from(self) -> Hessian:
        return Hessian()

    def rotated(self, value: Tensor, rotation: InputRotation) -> Tensor:
        return (MeanSquare().rotated(value, rotation) * (2 / math.pi)).sqrt()


@dataclass(frozen=True)
class MeanSquare(Statistic):
    """E[x_i²] over all tokens, float32 (I,); Σ w_t x_ti² / Σ w_t where they have weights."""

    kind = "mean_square"
    weights_tokens: ClassVar[bool] = True

    def accumulator(self, in_features: int, device: torch.device, offload: Allocator) -> MeanSquareAccumulator:
        return MeanSquareAccumulator(in_features, device, offload)

    def nbytes(self, in_features: int) -> int:
        return 8 * in_features

    def result_nbytes(self, in_features: int) -> int:
        return 4 * in_features

    @property
    def rotates_from(self) -> Hessian:
        return Hessian()

    def rotated(self, value: Tensor, rotation: InputRotation) -> Tensor:
        return Hessian().rotated(value, rotation).diagonal().clamp(min=0).to(torch.float32)


@dataclass(frozen=True)
class MaxAbs(Statistic):
    """The largest |x_i| over all tokens, float32 (I,)."""

    kind = "max_abs"

    def accumulator(self, in_features: int, device: torch.device, offload: Allocator) -> MaxAbsAccumulator:
        return MaxAbsAccumulator(in_features, device, offload)

    def nbytes(self, in_features: int) -> int:
        return 4 * in_features
