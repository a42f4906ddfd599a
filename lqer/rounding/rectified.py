"""The rectified sigmoid of adaptive rounding (AdaRound, arXiv 2004.10568, eq. 23), which reaches both of its ends.

h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)
"""

from __future__ import annotations

import torch
from torch import Tensor

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(v) in [0, 1]: the fraction of a step above the lower code. No gradient: see `Grid.weight` (soft.py)."""
    return torch.sigmoid(v).mul_(STRETCH_HIGH - STRETCH_LOW).add_(STRETCH_LOW).clamp_(0, 1)


def inverse_rectified_sigmoid(fraction: Tensor) -> Tensor:
    """The v with h(v) = fraction, for fractions in [0, 1)."""
    return torch.logit((fraction - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW))


def dequantization_scale(u: Tensor) -> Tensor:
    """2 h(u) in [0, 2], the factor of a group's step; its slope at u = 0 is 0.6."""
    return 2 * (torch.sigmoid(u) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)
