"""Rounding to nearest: every weight takes the closest value of its block, whatever the inputs.

Shapes: I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lqer.formats import NumberFormat, QuantizedTensor
from lqer.rounding.base import Rounding
from lqer.rounding.hessian import DampedHessian


def round_nearest(
    weight_OI: Tensor, hessian: Tensor | DampedHessian | None, number_format: NumberFormat
) -> QuantizedTensor:
    """weight_OI: float32. The hessian is not looked at. Raises NonFiniteError for NaN and infinities."""
    return number_format.quantize(weight_OI)


@dataclass(frozen=True)
class Nearest(Rounding):
    kind = "nearest"
    keeps_scales: ClassVar[bool] = True

    def round(
        self, weight_OI: Tensor, hessian: Tensor | DampedHessian | None, number_format: NumberFormat
    ) -> QuantizedTensor:
        return round_nearest(weight_OI, hessian, number_format)
