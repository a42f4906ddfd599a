"""Roundings: which of a number format's values each weight takes.

This folder imports torch, lqer.formats, lqer.statistics and lqer.components only. A new rounding is a file here,
imported below.
"""

from lqer.rounding.adaptive import Adaptive
from lqer.rounding.base import Rounding
from lqer.rounding.gptq import Gptq
from lqer.rounding.ldlq import Ldlq
from lqer.rounding.nearest import Nearest
from lqer.rounding.vector import Vector

ROUNDINGS: dict[str, type[Rounding]] = Rounding.registry

__all__ = ["ROUNDINGS", "Adaptive", "Gptq", "Ldlq", "Nearest", "Rounding", "Vector"]
