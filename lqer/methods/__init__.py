"""The published methods, each a composition of a rounding, a metric and a low-rank reconstruction.

A new method is a file here, imported below. One weight under three of them, and the relative error of the output:

>>> import torch
>>> from lqer.formats import MXInt
>>> generator = torch.Generator().manual_seed(0)
>>> weight_OI = torch.randn(64, 128, generator=generator) / 128**0.5
>>> x_TI = torch.randn(512, 128, generator=generator) * torch.logspace(-1, 1, 128)
>>> statistics = {"mean_abs": x_TI.abs().mean(0), "hessian": x_TI.T @ x_TI / 512}
>>> for method in (RoundingOnly(), LqerAct(), QeraExact()):
...     plan = LinearPlan(method, MXInt(bits=3), rank=16 if method.reconstructs else 0)
...     error_OI = plan.quantize(weight_OI, statistics).effective_weight() - weight_OI
...     print(f"{method.kind:10} {float((x_TI @ error_OI.T).norm() / (x_TI @ weight_OI.T).norm()):.2f}")
none       0.23
lqer-act   0.11
qera-exact 0.10
"""

from lqer.methods.base import LinearPlan, Method, Plans, RoundingOnly
from lqer.methods.caldera import Caldera
from lqer.methods.gptq import GptqMethod
from lqer.methods.gptvq import GptvqMethod
from lqer.methods.loftq import LoftQ
from lqer.methods.lqer import LqerAct, LqerSvd, ZeroQuantV2
from lqer.methods.qera import EoRA, QeraApprox, QeraExact
from lqer.methods.result import LowRank, QuantizedWeight
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
    "Plans",
    "QeraApprox",
    "QeraExact",
    "QuantizedWeight",
    "RoundingOnly",
    "SvdQuant",
    "ZeroQuantV2",
]
