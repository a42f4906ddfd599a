"""Values of a number format that are evenly spaced.

Shapes: G groups of all leading dims.
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
