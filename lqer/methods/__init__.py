"""The published methods, each a composition of a rounding, a metric and a low-rank reconstruction.

A new method is a file here, imported below.
"""

from lqer.methods.base import LinearPlan, LowRank, Method, QuantizedWeight, RoundingOnly
from lqer.methods.caldera import Caldera
from lqer.methods.gptq import GptqMethod
from lqer.methods.gptvq import GptvqMethod
from lqer.methods.loftq import LoftQ
from lqer.methods.lqer import LqerAct, LqerSvd, ZeroQuantV2
from lqer.methods.qera import EoRA, QeraApprox, QeraExact
from lqer.methods.svdquant import SvdQuant

METHODS: dict[str, type[Method]] = Method.registry

__all__ = [
    "METHODS",
    "Caldera",
    "EoRA",
    "GptqMethod",
    "GptvqMethod",
    "LinearPlan",
    "LoftQ",
    "LowRank",
    "LqerAct",
    "LqerSvd",
    "Method",
    "QeraApprox",
    "QeraExact",
    "QuantizedWeight",
    "RoundingOnly",
    "SvdQuant",
    "ZeroQuantV2",
]
