"""The diagonal S that says how much an error on each input channel matters (LQER, arXiv 2402.02446, section 3.3).

Shapes: I in_features.
"""

from __future__ import annotations

from torch import Tensor

# A channel that calibration never lit up would get weight 0 and make S singular.
SMALLEST_MEAN_ABS = 1e-4


def activation_scale(mean_abs_I: Tensor) -> Tensor:
    """L²QER's scale of each input channel.

    mean_abs_I: float32, the maximum over calibration batches of the mean of |x_i| in a batch. The values are clamped to
    1e-4 from below and divided by sqrt(min · max); the division only matters once A and B are rounded.
    """
    scale_I = mean_abs_I.clamp(min=SMALLEST_MEAN_ABS)
    return scale_I / (scale_I.min() * scale_I.max()).sqrt()
