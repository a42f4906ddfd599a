"""QERA (arXiv 2410.06040) and EoRA (arXiv 2410.21271).

    W_q = round(W);  E = W − W_q
    A·B = argmin_{rank r} E‖(Eᵀ − A·B)ᵀ x‖²  =  argmin || H^½ (Eᵀ − A·B) ||_F,   H = E[x xᵀ] (R in the paper)
    approx: H is taken as diagonal, H^½ = diag(sqrt(E[x_i²]))
    A, B = round(A), round(B)

EoRA projects E onto the eigenvectors of H, scaled by the roots of the eigenvalues, and truncates its SVD there: another
root of the same H, hence the same product A·B. The two names are one method here.

Shapes: I in_features, O out_features.
"""

from __future__ import annotations

from torch import Tensor

from lqer.lowrank.metric import Metric
from lqer.lowrank.scaling import rms_scale
from lqer.methods.base import Method, Statistics
from lqer.statistics import Hessian, MeanSquare
from lqer.statistics.site import derive


class QeraApprox(Method):
    """QERA-approx: H taken as diagonal."""

    kind = "qera-approx"
    statistics = frozenset({MeanSquare()})

    def metric(self, weight_OI: Tensor, statistics: Statistics) -> Metric:
        return Metric(scale_I=rms_scale(statistics["mean_square"]))


class QeraExact(Method):
    """QERA-exact: the full H, over its mean diagonal: A·B does not depend on the unit, the magnitudes of A and B do."""

    kind = "qera-exact"
    statistics = frozenset({Hessian()})

    def metric(self, weight_OI: Tensor, statistics: Statistics) -> Metric:
        return derive(statistics, _hessian_metric)


def _hessian_metric(statistics: Statistics) -> Metric:
    """The metric and its root are those of all linears of a site."""
    hessian_II = statistics["hessian"]
    mean = hessian_II.diagonal().mean()
    return Metric(hessian_II=hessian_II / mean if mean > 0 else hessian_II)


class EoRA(QeraExact):
    """EoRA: QERA-exact's product A·B by another root of H."""

    kind = "eora"
