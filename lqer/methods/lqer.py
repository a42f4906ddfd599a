"""Plain rounding, LQER and L²QER (arXiv 2402.02446, sections 3.2 and 3.3).

    W_q = round(W)                          once, in float32
    E   = W − W_q
    A·B = argmin_{rank r} || S (Eᵀ − A·B) ||_F       S = I: LQER;  S = diag(activation scale): L²QER
    A, B = round(A), round(B)

Shapes: I in_features, O out_features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lqer.lowrank.scaling import activation_scale
from lqer.lowrank.solver import reconstruct
from lqer.methods.base import LinearPlan, LowRank, Method, QuantizedWeight, Statistics


def _no_scale(statistics: Statistics) -> None:
    return None


def _activation_scale(statistics: Statistics) -> Tensor:
    return activation_scale(statistics["mean_abs"])


def quantize_linear(weight_OI: Tensor, statistics: Statistics, plan: LinearPlan) -> QuantizedWeight:
    """Round a weight and, at a rank above 0, reconstruct what rounding lost.

    weight_OI: any float dtype, computed on in float32. statistics: what the plan's method asks for, of shape (I,).
    Raises NonFiniteError if the weight holds NaN or infinities.
    """
    weight_OI = weight_OI.to(torch.float32)
    rounded_OI = plan.weight.quantize(weight_OI)
    if plan.rank == 0:
        return QuantizedWeight(rounded_OI, None)
    scale_I = METHODS[plan.method].scale(statistics)
    factors = reconstruct(weight_OI - rounded_OI.dequantize(), scale_I, plan.rank)
    a_axis, b_axis = plan.factor_axes
    low_rank = LowRank(plan.factor.quantize(factors.a_IR, axis=a_axis), plan.factor.quantize(factors.b_RO, axis=b_axis))
    return QuantizedWeight(rounded_OI, low_rank)


METHODS = {
    method.name: method
    for method in (
        Method("none", False, frozenset(), _no_scale, quantize_linear),
        Method("lqer-svd", True, frozenset(), _no_scale, quantize_linear),
        Method("lqer-act", True, frozenset({"mean_abs"}), _activation_scale, quantize_linear),
    )
}
