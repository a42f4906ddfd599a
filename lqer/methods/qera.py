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


def mean_squares(weight_OI: Tensor, statistics: Statistics) -> Metric:
    return Metric(scale_I=rms_scale(statistics["mean_square"]))


def autocorrelation(weight_OI: Tensor, statistics: Statistics) -> Metric:
    """R over its mean diagonal: A·B does not depend on the unit, A's and B's magnitudes do."""
    autocorrelation_II = statistics["autocorrelation"]
    mean = autocorrelation_II.diagonal().mean()
    return Metric(autocorrelation_II=autocorrelation_II / mean if mean > 0 else autocorrelation_II)


QERA_APPROX = Method("qera-approx", mean_squares, frozenset({"mean_square"}))
QERA_EXACT = Method("qera-exact", autocorrelation, frozenset({"autocorrelation"}))
EORA = Method("eora", autocorrelation, frozenset({"autocorrelation"}))
