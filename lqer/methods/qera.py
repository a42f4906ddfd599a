"""QERA (arXiv 2410.06040) and EoRA (arXiv 2410.21271).

    W_q = round(W);  E = W − W_q
    A·B = argmin_{rank r} E‖(Eᵀ − A·B)ᵀ x‖²  =  argmin || R^½ (Eᵀ − A·B) ||_F,   R = E[x xᵀ]
    approx: R is taken for diagonal, R^½ = diag(sqrt(E[x_i²]))
    A, B = round(A), round(B)

EoRA projects E onto the eigenvectors of R, scaled by the roots of the eigenvalues, and truncates its SVD there: another
root of the same R, hence the same product A·B. The two names are one method here.

Shapes: I in_features, O out_features.
"""

from __future__ import annotations

from torch import Tensor

from lqer.lowrank.metric import Metric
from lqer.lowrank.scaling import rms_scale
from lqer.methods.base import Method, Statistics
from lqer.statistics import Hessian, MeanSquare


def mean_squares(weight_OI: Tensor, statistics: Statistics) -> Metric:
    return Metric(scale_I=rms_scale(statistics["mean_square"]))


def full_hessian(weight_OI: Tensor, statistics: Statistics) -> Metric:
    """R over its mean diagonal: A·B does not depend on the unit, A's and B's magnitudes do."""
    hessian_II = statistics["hessian"]
    mean = hessian_II.diagonal().mean()
    return Metric(hessian_II=hessian_II / mean if mean > 0 else hessian_II)


QERA_APPROX = Method("qera-approx", mean_squares, frozenset({MeanSquare()}))
QERA_EXACT = Method("qera-exact", full_hessian, frozenset({Hessian()}))
EORA = Method("eora", full_hessian, frozenset({Hessian()}))
