"""GPTQ (arXiv 2210.17323): scalar rounding with error feedback, on the inputs that quantized blocks put out.

    for every block, first to last:
        H = E[x xᵀ] of its linears' inputs, on what the quantized blocks before it make of the text
        W_q = gptq(W, H)                                                    lqer/rounding/gptq.py
    at a rank above 0:  A·B = argmin_{rank r} || H^½ ((W − W_q)ᵀ − A·B) ||_F        QERA-exact's step

GPTQ itself has no low-rank part; the one here is QERA's closed form (arXiv 2410.06040) for the error that feedback
leaves, under the same second moments.
"""

from __future__ import annotations

from lqer.methods.base import Method
from lqer.methods.qera import full_hessian
from lqer.rounding import Gptq
from lqer.statistics import Hessian

GPTQ = Method("gptq", full_hessian, frozenset({Hessian()}), propagate="quantized", rounding=Gptq())
