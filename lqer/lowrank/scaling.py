"""Diagonal metrics S: the weight of an error on each input channel.

Shapes: I in_features, O out_features.
"""

from __future__ import annotations

from torch import Tensor

# A channel that is zero throughout calibration would get weight 0 and make S singular.
SMALLEST_MEAN_ABS = 1e-4
# The same for scales without an absolute floor, as a fraction of the largest: too small to affect the optimum.
RELATIVE_FLOOR = 1e-6
# SmoothQuant's α: how much of the outliers its factor moves from the inputs to the weight.
MIGRATION_STRENGTH = 0.5


def activation_scale(mean_abs_I: Tensor) -> Tensor:
    """L²QER's scale of each input channel (LQER, arXiv 2402.02446, section 3.3).

    mean_abs_I: float32, the maximum over calibration batches of the mean of |x_i| in a batch. The values are clamped to
    at least 1e-4 and divided by sqrt(min · max); the division only matters once A and B are rounded.
    """
    scale_I = mean_abs_I.clamp(min=SMALLEST_MEAN_ABS)
    return scale_I / (scale_I.min() * scale_I.max()).sqrt()


def rms_scale(mean_square_I: Tensor) -> Tensor:
    """QERA-approx's scale sqrt(E[x_i²]) (QERA, arXiv 2410.06040), divided by its own root mean square.

    mean_square_I: float32, over all calibration tokens. Channels without input get 1e-6 of the largest scale, a site
    without any input a scale of ones.
    """
    return _floored(mean_square_I.sqrt())


def smoothing_scale(max_abs_I: Tensor, weight_OI: Tensor) -> Tensor:
    """SmoothQuant's factor sqrt(max|x_i| / max|w_oi|) (arXiv 2211.10438, equation 4), as SVDQuant uses it.

    max_abs_I: float32, over all calibration tokens. weight_OI: float32. Channels that are zero in the inputs or
    the weight get 1e-6 of the largest factor.
    """
    weight_I = weight_OI.abs().amax(0)
    weight_I = weight_I.clamp(min=weight_I.max() * RELATIVE_FLOOR).clamp(min=1e-30)
    return _floored(max_abs_I**MIGRATION_STRENGTH / weight_I ** (1 - MIGRATION_STRENGTH))


def _floored(scale_I: Tensor) -> Tensor:
    scale_I = scale_I / scale_I.square().mean().sqrt().clamp(min=1e-30)
    largest = scale_I.max()
    return scale_I.clamp(min=float(largest) * RELATIVE_FLOOR if largest > 0 else 1.0)
