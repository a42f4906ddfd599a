"""LQER and L²QER (arXiv 2402.02446, sections 3.2 and 3.3), and ZeroQuant-V2's compensation.

    W_q = round(W)                          once, in float32
    E   = W − W_q
    A·B = argmin_{rank r} || S (Eᵀ − A·B) ||_F       S = I: LQER;  S = diag(activation scale): L²QER
    A, B = round(A), round(B)

ZeroQuant-V2 (arXiv 2303.08302) is LQER's S = I on weights alone.

Shapes: I in_features, O out_features.
"""

from __future__ import annotations

from torch import Tensor

from lqer.lowrank.metric import Metric
from lqer.lowrank.scaling import activation_scale
from lqer.methods.base import Method, Statistics
from lqer.statistics import MeanAbs


class LqerSvd(Method):
    """LQER: truncated SVD of the rounding error, S = I."""

    kind = "lqer-svd"


class LqerAct(Method):
    """L²QER: truncated SVD of the rounding error scaled by activation magnitudes, S = diag(s)."""

    kind = "lqer-act"
    statistics = frozenset({MeanAbs()})

    def metric(self, weight_OI: Tensor, statistics: Statistics) -> Metric:
        return Metric(scale_I=activation_scale(statistics["mean_abs"]))


class ZeroQuantV2(LqerSvd):
    """ZeroQuant-V2's low-rank compensation (arXiv 2303.08302): `lqer-svd` by another name."""

    kind = "zeroquant-v2"
