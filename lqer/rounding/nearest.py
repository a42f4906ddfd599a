"""Rounding to nearest: every weight takes the closest value of its group, whatever the inputs.

Shapes: I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lqer.formats import NumberFormat, QuantizedTensor
from lqer.rounding.base import Rounding, Statistics


@dataclass(frozen=True)
class Nearest(Rounding):
    """`nearest` as a configuration names it: round-to-nearest (RTN)."""

    kind = "nearest"
    keeps_scales: ClassVar[bool] = True

    def round(self, weight_OI: Tensor, statistics: Statistics, number_format: NumberFormat) -> QuantizedTensor:
        return number_format.quantize(weight_OI)
