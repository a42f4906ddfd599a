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
    """QERA-approx: least error of the outputs if input channels were uncorrelated, H = diag(E[x²])."""

    kind = "qera-approx"
    statistics = frozenset({MeanSquare()})

    def metric(self, weight_OI: Tensor, statistics: Statistics) -> Metric:
        return Metric(scale_I=rms_scale(statistics["mean_square"]))


class QeraExact(Method):
    """QERA-exact: least error of the outputs, under the full H = E[x xᵀ]."""

    kind = "qera-exact"
    statistics = frozenset({Hessian()})

    def metric(self, weight_OI: Tensor, statistics: Statistics) -> Metric:
        return derive(statistics, _hessian_metric)


def _hessian_metric(statistics: Statistics) -> Metric:
    """The metric and its root are those of all linears of a site.

    H is divided by its mean diagonal: A·B does not depend on its unit, the magnitudes of A and B do.
    """
    hessian_II = statistics["hessian"]
    mean = hessian_II.diagonal().mean()
    return Metric(hessian_II=hessian_II / mean if mean > 0 else hessian_II)


class EoRA(QeraExact):
    """EoRA (arXiv 2410.21271): the A·B of QERA-exact, by another root of H."""

    kind = "eora"
