"""Statistics of the inputs of linear layers: magnitudes, the Hessian, the mismatch with the original, a sample.

This folder imports torch and lqer.components only. A new statistic is a file of its own; a rounding or a method that
names it in its `statistics` has it gathered.
"""

from lqer.statistics.base import Accumulator, Allocator, InputRotation, Statistic
from lqer.statistics.gang import ALONE, Gang
from lqer.statistics.hessian import Hessian
from lqer.statistics.magnitudes import MaxAbs, MeanAbs, MeanSquare
from lqer.statistics.mismatch import Mismatch
from lqer.statistics.sample import Sample

# Gathered whatever is asked for: they cost next to nothing, and reports need them.
ALWAYS: tuple[Statistic, ...] = (MeanAbs(), MeanSquare(), Sample())

__all__ = [
    "ALONE",
    "ALWAYS",
    "Accumulator",
    "Allocator",
    "Gang",
    "Hessian",
    "InputRotation",
    "MaxAbs",
    "MeanAbs",
    "MeanSquare",
    "Mismatch",
    "Sample",
    "Statistic",
]
