"""The published methods, each a composition of a rounding, a metric and a low-rank reconstruction."""

from lqer.methods.base import LinearPlan, LowRank, Method, Propagation, QuantizedWeight
from lqer.methods.caldera import CALDERA
from lqer.methods.gptq import GPTQ
from lqer.methods.gptvq import GPTVQ
from lqer.methods.loftq import LOFTQ
from lqer.methods.lqer import LQER_ACT, LQER_SVD, NONE, ZEROQUANT_V2
from lqer.methods.qera import EORA, QERA_APPROX, QERA_EXACT
from lqer.methods.settings import CalderaSettings
from lqer.methods.svdquant import SVDQUANT

_ALL = (NONE, LQER_SVD, LQER_ACT, QERA_APPROX, QERA_EXACT, ZEROQUANT_V2, LOFTQ, EORA, SVDQUANT, GPTQ, GPTVQ, CALDERA)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}

__all__ = ["METHODS", "CalderaSettings", "LinearPlan", "LowRank", "Method", "Propagation", "QuantizedWeight"]
