"""GPTQ: round column by column; the remaining columns compensate the error of each one (arXiv 2210.17323).

    U = upper Cholesky factor of H⁻¹,   H = E[x xᵀ], damped          H⁻¹ = Uᵀ U
    for every column i, or vector of columns that share a code, first to last:
        at the start of a group: fit its scale to the current W, with errors weighted by 1 / U_jj² if it is searched
        Q_i = round(W_i)
        E_i = (W_i - Q_i) U_ii⁻¹
        W_j = W_j - E_i U_ij        for all j > i

The last line is applied immediately within a panel of columns, and to the later columns once per panel, in one product.
On a GPU the columns of a panel are walked by one kernel (rounding/scalar_panel.py).
A format with codes for vectors of D columns is swept in steps of D, with U_ii the D x D block: the exact update of the
remaining columns (GPTVQ, 2402.15319). Matrices of one shape, as those of a layer's experts, are swept together.

Shapes: E matrices, O out_features, I in_features, N rows of all matrices, P columns of a panel, D columns of a vector,
L codes of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lqer.components import ADDED
from lqer.formats import NumberFormat, QuantizedTensor
from lqer.formats.base import check_finite
from lqer.rounding.base import Rounding, Statistics, require_damping, unsupported_feedback
from lqer.rounding.descent import descend, require_descent, unsupported_descent
from lqer.rounding.factor import feedback_factor
from lqer.rounding.groups import Groups
from lqer.rounding.hessian import DAMPING, DampedHessian, damped_hessian
from lqer.rounding.scale_search import Scales, importance, require_scales, unsupported_search
from lqer.rounding.stack import add_products, rows_of_all, side_by_side, stacked
from lqer.statistics import Hessian, Statistic


def gptq(
    weight_OI: Tensor,
    damped: DampedHessian,
    number_format: NumberFormat,
    *,
    activation_order: bool = False,
    static_groups: bool = False,
    scales: Scales = "minmax",
    descent: int = 0,
) -> QuantizedTensor:
    """Round a float32 weight with error feedback.

    damped: E[x xᵀ] of the weight's inputs. Weights of inputs that are always zero (H_ii = 0) become 0.

    static_groups: all scales are fitted to the weight before any feedback. activation_order: columns with the largest
    H_ii first; a group's columns are then not adjacent in the sweep, so that groups are static. scales: how a group's
    scale is fitted, as the format does or by search (rounding/scale_search.py). descent: turns of refitting the scales
    and of coordinate descent afterwards (rounding/descent.py), which never raise the loss under the damped Hessian.

    Raises NonFiniteError for a weight that is not finite, HessianError as a factorization of `damped` does, ValueError
    for settings that exclude each other.
    """
    check_finite(weight_OI)
    step = number_format.vector_size
    if activation_order and step > 1:
        raise ValueError(f"activation_order would separate the columns of vectors of {step} ({number_format.kind})")
    weight_OI = _without_dead(weight_OI, damped)
    upper_II, order_I = damped.derived(feedback_factor, activation_order)
    importance_I = importance(scales, upper_II.diagonal().pow(-2)[order_I.argsort()])
    groups = Groups(number_format, len(weight_OI), len(order_I), None if importance_I is None else importance_I[None])
    if static_groups or activation_order or groups.single:
        groups.fit_all(weight_OI)
    codes_OL = _sweep(weight_OI.T[order_I].unsqueeze(1), upper_II.unsqueeze(0), order_I.tolist(), groups)
    (quantized,) = groups.finish(codes_OL[:, order_I.argsort()] if activation_order else codes_OL)
    return descend(weight_OI, damped.hessian_II, quantized, descent) if descent else quantized


def gptq_together(
    weights: Sequence[Tensor],
    hessians: Sequence[DampedHessian],
    number_format: NumberFormat,
    *,
    static_groups: bool = False,
    scales: Scales = "minmax",
) -> list[QuantizedTensor]:
    """`gptq` of several weights of one shape, first to last column, each under the Hessian at its place."""
    check_finite(*weights)
    weights = [_without_dead(weight_OI, damped) for weight_OI, damped in zip(weights, hessians, strict=True)]
    upper_EII = stacked([damped.derived(feedback_factor, False)[0] for damped in hessians])
    importance_EI = importance(scales, upper_EII.diagonal(dim1=1, dim2=2).pow(-2))
    weight_IEO = side_by_side(weights)
    in_features, matrices, out_features = weight_IEO.shape
    groups = Groups(number_format, out_features, in_features, importance_EI, matrices)
    if static_groups or groups.single:
        groups.fit_all(rows_of_all(weight_IEO))
    return groups.finish(_sweep(weight_IEO, upper_EII, [*range(len(weight_IEO))], groups))


def _without_dead(weight_OI: Tensor, damped: DampedHessian) -> Tensor:
    return weight_OI.to(torch.float32).masked_fill(damped.dead_I, 0)


def _sweep(weight_IEO: Tensor, upper_EII: Tensor, columns: list[int], groups: Groups) -> Tensor:
    """Codes (N, L) in the order of the sweep; the weight is changed in place. columns: where it has them."""
    in_one_kernel = weight_IEO.is_cuda and (groups.evenly_spaced or groups.has_levels)
    round_panel = _panel_in_one_kernel if in_one_kernel else _panel_column_by_column
    codes: list[Tensor] = []
    for start in range(0, len(weight_IEO), groups.panel):
        now = slice(start, min(start + groups.panel, len(weight_IEO)))
        panel_codes, error_PEO = round_panel(weight_IEO[now], upper_EII[:, now, now], columns[now], groups)
        codes += panel_codes
        add_products(weight_IEO[now.stop :], upper_EII[:, now, now.stop :], error_PEO, alpha=-1)
    return torch.cat(codes, dim=1)


def _panel_column_by_column(
    weight_PEO: Tensor, upper_EPP: Tensor, columns: list[int], groups: Groups
) -> tuple[list[Tensor], Tensor]:
    """Codes (N, 1) of each column or vector, and scaled errors; the weight is changed in place."""
    step = groups.number_format.vector_size
    codes: list[Tensor] = []
    error_PEO = torch.empty_like(weight_PEO)
    for i in range(0, len(columns), step):
        now, column = slice(i, min(i + step, len(columns))), columns[i]
        if not groups.is_fitted(column):
            first = groups.columns(column).start - column + i
            groups.fit(column, rows_of_all(weight_PEO[first : first + groups.width]))
        code_N1, values_ND = groups.round(column, rows_of_all(weight_PEO[now]))
        codes.append(code_N1)
        error_DEO = weight_PEO[now] - values_ND.T.unflatten(1, weight_PEO.shape[1:])
        if step == 1:
            error_DEO /= upper_EPP[:, i, i, None]
        else:
            error_EDO = error_DEO.transpose(0, 1)
            error_DEO = torch.linalg.solve_triangular(upper_EPP[:, now, now].mT, error_EDO, upper=False).transpose(0, 1)
        error_PEO[now] = error_DEO
        add_products(weight_PEO[now.stop :], upper_EPP[:, now, now.stop :], error_PEO[now], alpha=-1)
    return codes, error_PEO


def _panel_in_one_kernel(
    weight_PEO: Tensor, upper_EPP: Tensor, columns: list[int], groups: Groups
) -> tuple[list[Tensor], Tensor]:
    """The same on a GPU, where a column would cost some twenty launches; codes in panels."""
    from lqer.rounding.scalar_panel import sweep_scalars

    codes: list[Tensor] = []
    error_PEO = torch.empty_like(weight_PEO)
    width = len(columns) if all(groups.is_fitted(column) for column in columns) else groups.width
    for first in range(0, len(columns), width):
        now = slice(first, min(first + width, len(columns)))
        groups.fit(columns[first], rows_of_all(weight_PEO[now]))
        codes_PN, error_PEO[now] = sweep_scalars(weight_PEO[now], upper_EPP[:, now, now], groups, columns[now])
        codes.append(codes_PN.T)
        add_products(weight_PEO[now.stop :], upper_EPP[:, now, now.stop :], error_PEO[now], alpha=-1)
    return codes, error_PEO


@dataclass(frozen=True)
class Gptq(Rounding):
    """`gptq` as a configuration names it."""

    kind = "gptq"
    statistics: ClassVar[frozenset[Statistic]] = frozenset({Hessian()})

    damping: float = DAMPING
    activation_order: bool = False
    static_groups: bool = False
    scales: Scales = field(default="minmax", metadata=ADDED)
    descent: int = field(default=0, metadata=ADDED)

    def __post_init__(self) -> None:
        require_damping(self.damping, self.kind)
        require_scales(self.scales, self.kind)
        require_descent(self.descent, self.kind)

    def round(self, weight_OI: Tensor, statistics: Statistics, number_format: NumberFormat) -> QuantizedTensor:
        return gptq(
            weight_OI, damped_hessian(statistics, self.damping), number_format,
            activation_order=self.activation_order, static_groups=self.static_groups, scales=self.scales,
            descent=self.descent,
        )  # fmt: skip

    def round_together(
        self, weights: Sequence[Tensor], statistics: Sequence[Statistics], number_format: NumberFormat
    ) -> list[QuantizedTensor]:
        # Each has an order of its own there, and descends on its own.
        if len(weights) == 1 or self.activation_order or self.descent:
            return super().round_together(weights, statistics, number_format)
        hessians = [damped_hessian(of_one, self.damping) for of_one in statistics]
        return gptq_together(weights, hessians, number_format, static_groups=self.static_groups, scales=self.scales)

    def unsupported_reason(self, number_format: NumberFormat) -> str | None:
        if self.activation_order and number_format.vector_size > 1:
            return f'activation_order would separate the columns of the vectors of "{number_format.kind}"'
        reasons = unsupported_search(number_format, self.scales), unsupported_descent(number_format, self.descent)
        return unsupported_feedback(number_format) or next(filter(None, reasons), None)
