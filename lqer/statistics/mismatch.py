"""How far the quantized model's inputs are from the original's: M = E[(x_o - x) xᵀ] over the same tokens.

x_o are the inputs of a linear in the original model, x those in the quantized one. With H = E[x xᵀ] the weight W* that
comes closest to the original outputs, argmin E‖W x_o - W* x‖², is W (H + M) H⁻¹ (lqer/methods/asymmetric.py). Equal
inputs make M exactly zero. Where tokens have weights, M = Σ w_t (x_o - x)_t x_tᵀ / Σ w_t.

Shapes: I in_features, N tokens of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lqer.statistics.base import Allocator, InputRotation, Statistic
from lqer.statistics.gang import Gang, add_up
from lqer.statistics.hessian import total_weight
from lqer.statistics.products import add_products, multiplicand


class MismatchAccumulator:
    """Σ w (x_o - x) xᵀ in float64."""

    def __init__(self, in_features: int, device: torch.device, offload: Allocator):
        self._sum_II = offload.zeros([in_features, in_features], torch.float64, device)
        self._total: float | Tensor = 0

    def add(self, x_NI: Tensor, original_NI: Tensor | None, sampled_N: Tensor, weights_N: Tensor | None = None) -> None:
        assert original_NI is not None, "the statistic says that it needs the original's inputs"
        self._total = self._total + total_weight(x_NI, weights_N)
        difference_NI = original_NI.to(torch.float32) - x_NI.to(torch.float32)
        if weights_N is not None:
            difference_NI *= weights_N.unsqueeze(-1)
        add_products(self._sum_II, multiplicand(difference_NI, x_NI.dtype), x_NI)

    def join(self, gang: Gang) -> None:
        gang.sum_(self._sum_II)
        self._total = add_up(gang.gathered(self._total))

    def result(self) -> Tensor:
        return (self._sum_II / self._total).to(torch.float32)


@dataclass(frozen=True)
class Mismatch(Statistic):
    """E[(x_o - x) xᵀ], float32 (I, I)."""

    kind = "mismatch"
    needs_original: ClassVar[bool] = True
    weights_tokens: ClassVar[bool] = True

    def accumulator(self, in_features: int, device: torch.device, offload: Allocator) -> MismatchAccumulator:
        return MismatchAccumulator(in_features, device, offload)

    def nbytes(self, in_features: int) -> int:
        return 8 * in_features**2

    def result_nbytes(self, in_features: int) -> int:
        return 4 * in_features**2

    @property
    def rotates_from(self) -> Mismatch:
        return self

    def rotated(self, value: Tensor, rotation: InputRotation) -> Tensor:
        """V M Vᵀ in float64."""
        return rotation.input(rotation.input(value.to(torch.float64)).T).T
