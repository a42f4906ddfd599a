"""Rounding to nearest: every weight takes the closest value of its group.

The scale of a group is that of the format's own fit, whatever the inputs, or the one with the least output error
Σ_j E[x_j²] (q(w_j) - w_j)² if the errors of different inputs did not correlate, or Σ_j (q(w_j) - w_j)²
(rounding/scale_search.py).

Shapes: I in_features, O out_features, G groups of a row, g values of a group, V codes of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lqer.components import ADDED
from lqer.formats import NumberFormat, QuantizedTensor
from lqer.formats.base import check_finite
from lqer.formats.blocks import from_blocks, to_blocks
from lqer.rounding.base import Rounding, Statistics
from lqer.rounding.scale_search import Scales, require_scales, searched_scales, unsupported_search
from lqer.statistics import MeanSquare, Statistic


def nearest(weight_OI: Tensor, importance_I: Tensor, number_format: NumberFormat) -> QuantizedTensor:
    """Round a weight under searched scales.

    importance_I: what an error of each weight costs, at least 0. Raises NonFiniteError for a weight that is not finite.
    """
    check_finite(weight_OI)
    weight_OGg = to_blocks(weight_OI.to(torch.float32), number_format.block_size)
    importance_Gg = to_blocks(importance_I.to(torch.float32), number_format.block_size)
    scales = searched_scales(number_format, weight_OGg, importance_Gg)
    codes_OV = from_blocks(number_format.encode(weight_OGg, scales), number_format.code_count(weight_OI.shape[1]))
    return QuantizedTensor(number_format, tuple(weight_OI.shape), 1, {"codes": codes_OV, **scales})


@dataclass(frozen=True)
class Nearest(Rounding):
    """`nearest` as a configuration names it: round-to-nearest (RTN)."""

    kind = "nearest"

    scales: Scales = field(default="minmax", metadata=ADDED)

    def __post_init__(self) -> None:
        require_scales(self.scales, self.kind)

    @property
    def statistics(self) -> frozenset[Statistic]:
        return frozenset({MeanSquare()}) if self.scales == "search" else frozenset()

    @property
    def keeps_scales(self) -> bool:
        return self.scales == "minmax"

    def round(self, weight_OI: Tensor, statistics: Statistics, number_format: NumberFormat) -> QuantizedTensor:
        if self.scales == "minmax":
            return number_format.quantize(weight_OI)
        if self.scales == "least-squares":
            return nearest(weight_OI, weight_OI.new_ones(weight_OI.shape[1]), number_format)
        mean_square_I = statistics["mean_square"]
        assert isinstance(mean_square_I, Tensor), "a method damps the Hessian only"
        return nearest(weight_OI, mean_square_I, number_format)

    def round_together(
        self, weights: Sequence[Tensor], statistics: Sequence[Statistics], number_format: NumberFormat
    ) -> list[QuantizedTensor]:
        # Scales and tables of a whole matrix, and searched scales, are each one's own.
        own = number_format.block_size == "tensor" or number_format.codebook_parts or self.scales != "minmax"
        if own or len(weights) == 1:
            return super().round_together(weights, statistics, number_format)
        parts, shape = number_format.quantize(torch.stack(list(weights))).parts, tuple(weights[0].shape)
        each = zip(*parts.values(), strict=True)
        return [QuantizedTensor(number_format, shape, 1, dict(zip(parts, of_one, strict=True))) for of_one in each]

    def unsupported_reason(self, number_format: NumberFormat) -> str | None:
        return unsupported_search(number_format, self.scales)
