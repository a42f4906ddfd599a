"""Values of a number format that are evenly spaced, or multiples of a few fixed levels.

Shapes: G groups of all leading dims, K levels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Spacing:
    """Evenly spaced values of groups [G]: value = (code - zero) * step, with codes from min_code to max_code.

    step_G, zero_G: float32; a zero point is an integer, or -1/2 for values half a step from zero (mid-rise). A step can
    be too small to divide by (MXINT's zero blocks).
    """

    step_G: Tensor
    zero_G: Tensor
    min_code: int
    max_code: int


@dataclass(frozen=True)
class Levels:
    """Values of groups [G] that are multiples of a few levels: value = level * step.

    step_G: float32; where it is 0 the level is that of 0. levels_K: float32, ascending. boundaries_K: float32, K - 1,
    ascending: a value belongs to the level with as many boundaries below value / step. codes_K: uint8, that of each.
    """

    step_G: Tensor
    levels_K: Tensor
    boundaries_K: Tensor
    codes_K: Tensor
