"""The published methods, each a composition of a rounding, a scaling and a low-rank reconstruction."""

from lqer.methods.base import LinearPlan, LowRank, Method, QuantizedWeight
from lqer.methods.lqer import METHODS

__all__ = ["METHODS", "LinearPlan", "LowRank", "Method", "QuantizedWeight"]
