"""The errors that rounding in each of several formats makes in a sample of the rows of some linears.

Where A and B are a choice too, the plan has a rank. The errors that A and B leave then follow, for all rows: A·B fitted
to some of the rows would be another product.

Errors are those of the plan's own rounding, except for trellis codes of rotated weights. A search over such codes goes
through a row of tiles one after the other, which a GPU spends waiting; its errors have a law from which they can be
drawn (lqer/rounding/trellis_law.py).

Shapes: O out_features, I in_features, S sampled rows, F formats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from lqer.formats import NumberFormat, Trellis
from lqer.methods import LinearPlan
from lqer.methods.base import Target, reconstruct_rounded
from lqer.rounding import Ldlq
from lqer.rounding.base import Rounding, Statistics
from lqer.rounding.hessian import damped_hessian
from lqer.rounding.trellis_law import drawn_errors
from lqer.transforms import Hadamard

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
        rows = len(target.weight_OI)
        rows_S = _rows_on(rows, rows if plan.rank else most, target.weight_OI.device)
        return cls(name, plan, target, rows_S, target.weight_OI[rows_S])

    @property
    def statistics(self) -> Statistics:
        return self.target.statistics


@lru_cache
def _rows_on(out_features: int, most: int, device: torch.device) -> Tensor:
    return sampled_rows(out_features, most).to(device)


def sampled_rows(out_features: int, most: int = SAMPLED_ROWS) -> Tensor:
    """Indices of `most` rows, in runs of ROW_RUN that are evenly spaced; of all rows where there are fewer."""
    if out_features <= most:
        return torch.arange(out_features)
    runs, taken = out_features // ROW_RUN, most // ROW_RUN
    first = torch.arange(taken) * runs // taken * ROW_RUN
    return (first[:, None] + torch.arange(ROW_RUN)).flatten()


def errors_of(linears: Sequence[Sampled], formats: Sequence[NumberFormat]) -> list[list[Tensor]]:
    """E = W − W_q of each linear's rows (S, I), by linear and format, under the rounding of their plans; with a rank,
    then E − (A·B)ᵀ in the same order.

    linears: of one site, with the same statistics; or of one shape and plan. Raises as the roundings do.
    """
    shared = all(one.statistics is linears[0].statistics for one in linears)
    found = []
    for batch in [[one] for one in linears] if shared else [linears]:
        by_format = [part_of(batch[0].plan, number_format)(batch) for number_format in formats]
        found += [list(errors) for errors in zip(*by_format, strict=True)]
    return [errors + _left(one, errors) for one, errors in zip(linears, found, strict=True)]


def _left(linear: Sampled, errors: Sequence[Tensor]) -> list[Tensor]:
    """What A and B of the plan's rank leave of each error; nothing without a rank."""
    if not linear.plan.rank:
        return []
    metric = linear.plan.method.metric(linear.target.weight_OI, linear.target.statistics)
    return [error_SI - reconstruct_rounded(error_SI, metric, linear.plan).product() for error_SI in errors]


def part_of(plan: LinearPlan, number_format: NumberFormat) -> Callable[[Sequence[Sampled]], list[Tensor]]:
    """What finds the errors in a format of linears that have the plan."""
    match number_format, plan.rounding, plan.transform:
        case Trellis(), Ldlq(tune_iters=0) as ldlq, Hadamard():
            return partial(_drawn, number_format, ldlq.damping)
    return partial(_of_rounding, number_format, plan.rounding)


def _drawn(number_format: Trellis, damping: float, linears: Sequence[Sampled]) -> list[Tensor]:
    weights = [one.weight_SI for one in linears]
    return drawn_errors(weights, [damped_hessian(one.statistics, damping) for one in linears], number_format)


def _of_rounding(number_format: NumberFormat, rounding: Rounding, linears: Sequence[Sampled]) -> list[Tensor]:
    weights = [one.weight_SI for one in linears]
    rounded = rounding.round_together(weights, [one.statistics for one in linears], number_format)
    return [weight_SI - one.dequantize() for weight_SI, one in zip(weights, rounded, strict=True)]
