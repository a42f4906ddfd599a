"""SVDQuant (arXiv 2411.05007): low-rank factors absorb the outliers of the weight before it is rounded.

    λ   = sqrt(max|x_i| / max|w_oi|)                          SmoothQuant's factor, per input channel
    A·B = argmin_{rank r} || diag(λ) (Wᵀ − A·B) ||_F          the SVD of the smoothed weight;  A, B = round(A), round(B)
    W_q = round(W − (A·B)ᵀ)

The published method also divides the inputs by λ and rounds the residual of the smoothed weight. That is a transform of
the layer, not a reconstruction: here λ only determines A·B.

Shapes: I in_features, O out_features.
"""

from __future__ import annotations

from torch import Tensor

from lqer.lowrank.metric import Metric
from lqer.lowrank.scaling import smoothing_scale
from lqer.methods.base import Method, Statistics
from lqer.statistics import MaxAbs


class SvdQuant(Method):
    """SVDQuant (arXiv 2411.05007): low-rank factors of the smoothed weight, then rounding of the rest."""

    kind = "svdquant"
    statistics = frozenset({MaxAbs()})
    rounds_first = False

    def metric(self, weight_OI: Tensor, statistics: Statistics) -> Metric:
        return Metric(scale_I=smoothing_scale(statistics["max_abs"], weight_OI))
