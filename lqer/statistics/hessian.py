"""The Hessian H = E[x xᵀ] of a linear's inputs: the mean over all tokens, not centred.

An error E of the weight costs E‖E x‖² = tr(E H Eᵀ) at the layer's output, so 2 H is the Hessian of the layer's squared
output error with respect to each row of the weight. Where tokens have weights, H = Σ w_t x_t x_tᵀ / Σ w_t.

Shapes: I in_features, N tokens of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lqer.statistics.base import Allocator, InputRotation, Statistic
from lqer.statistics.gang import Gang, add_up
from lqer.statistics.products import add_products, mirrored_mean, multiplicand, symmetric_mean


class HessianAccumulator:
    """Σ w x xᵀ in float64; on a GPU its lower triangle."""

    def __init__(self, in_features: int, device: torch.device, offload: Allocator):
        self._sum_II = offload.zeros([in_features, in_features], torch.float64, device)
        self._mean = mirrored_mean if device.type == "cuda" else symmetric_mean
        self._total: float | Tensor = 0

    def add(self, x_NI: Tensor, original_NI: Tensor | None, sampled_N: Tensor, weights_N: Tensor | None = None) -> None:
        self._total = self._total + total_weight(x_NI, weights_N)
        if weights_N is not None:
            x_NI = multiplicand(x_NI.to(torch.float32) * weights_N.sqrt().unsqueeze(-1), x_NI.dtype)
        add_products(self._sum_II, x_NI)

    def join(self, gang: Gang) -> None:
        gang.sum_(self._sum_II)
        self._total = add_up(gang.gathered(self._total))

    def result(self) -> Tensor:
        return self._mean(self._sum_II, self._total)


def total_weight(x_NI: Tensor, weights_N: Tensor | None) -> int | Tensor:
    """What the tokens of a batch count together; a float64 scalar, or their number where they have no weights."""
    return len(x_NI) if weights_N is None else weights_N.to(torch.float64).sum()


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
