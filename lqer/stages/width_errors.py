"""The errors that rounding in each of several formats makes in a sample of the rows of some linears.

A search over trellis codes goes through a row of tiles one after the other. The few tiles of a sample leave most of a
GPU idle, and it waits for each of them. So linears that share their statistics are searched together, a tile of each
at a time, and experts as when they are quantized.

Shapes: O out_features, I in_features, S sampled rows, F formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lqer.formats import NumberFormat, Trellis
from lqer.formats.scales import root_mean_square
from lqer.methods import LinearPlan
from lqer.methods.base import Target
from lqer.rounding import Ldlq
from lqer.rounding.base import Statistics

SAMPLED_ROWS = 512  # of a weight, in runs of ROW_RUN: tiles of 16 rows share codes in some formats
EXPERT_ROWS = 128  # of an expert's weight
ROW_RUN = 16


@dataclass(frozen=True)
class Sampled:
    """Rows of a linear's target, by their indices (S,) within it."""

    name: str
    plan: LinearPlan
    target: Target
    rows_S: Tensor
    weight_SI: Tensor

    @classmethod
    def of(cls, name: str, plan: LinearPlan, target: Target, most: int = SAMPLED_ROWS) -> Sampled:
        rows_S = sampled_rows(len(target.weight_OI), most).to(target.weight_OI.device)
        return cls(name, plan, target, rows_S, target.weight_OI[rows_S])

    @property
    def statistics(self) -> Statistics:
        return self.target.statistics


def sampled_rows(out_features: int, most: int = SAMPLED_ROWS) -> Tensor:
    """Indices of `most` rows, in runs of ROW_RUN that are evenly spaced; of all rows where there are fewer."""
    if out_features <= most:
        return torch.arange(out_features)
    runs, taken = out_features // ROW_RUN, most // ROW_RUN
    first = torch.arange(taken) * runs // taken * ROW_RUN
    return (first[:, None] + torch.arange(ROW_RUN)).flatten()


def errors_of(linears: Sequence[Sampled], formats: Sequence[NumberFormat]) -> list[list[Tensor]]:
    """E = W − W_q of each linear's rows (S, I), by linear and format, under the rounding of their plans.

    linears: of one site, with the same statistics; or of one shape and plan. Raises as the roundings do.
    """
    by_format = [_errors(linears, number_format) for number_format in formats]
    return [list(errors) for errors in zip(*by_format, strict=True)]


def _errors(linears: Sequence[Sampled], number_format: NumberFormat) -> list[Tensor]:
    """Of each linear in one format."""
    first = linears[0]
    if any(one.statistics is not first.statistics for one in linears):
        return _errors_of_alike(linears, number_format)
    together = (
        isinstance(number_format, Trellis)
        and isinstance(first.plan.rounding, Ldlq)
        and all(one.plan.rounding == first.plan.rounding for one in linears)
    )
    if together:
        return _errors_together(linears, number_format)
    return [
        one.weight_SI - one.plan.rounding.round(one.weight_SI, one.statistics, number_format).dequantize()
        for one in linears
    ]


def _errors_of_alike(linears: Sequence[Sampled], number_format: NumberFormat) -> list[Tensor]:
    """Of linears of one shape and plan, each under its own statistics."""
    weights, statistics = [one.weight_SI for one in linears], [one.statistics for one in linears]
    rounded = linears[0].plan.rounding.round_together(weights, statistics, number_format)
    return [weight_SI - one.dequantize() for weight_SI, one in zip(weights, rounded, strict=True)]


def _errors_together(linears: Sequence[Sampled], number_format: NumberFormat) -> list[Tensor]:
    """Rows are rounded independently of each other but for the scale of a matrix, which follows its mean square."""
    # Zeros have no error, and would count in the mean.
    sizes = {one.name: root_mean_square(one.weight_SI.flatten()).float() for one in linears if one.weight_SI.any()}
    errors = {one.name: torch.zeros_like(one.weight_SI) for one in linears if one.name not in sizes}
    if units := {one.name: one.weight_SI / sizes[one.name] for one in linears if one.name in sizes}:
        unit_SI = torch.cat([*units.values()])
        rounded_SI = linears[0].plan.rounding.round(unit_SI, linears[0].statistics, number_format).dequantize()
        split = (unit_SI - rounded_SI).split([*map(len, units.values())])
        errors |= {name: error_SI * sizes[name] for name, error_SI in zip(units, split, strict=True)}
    return [errors[one.name] for one in linears]
