"""GPTVQ (arXiv 2402.15319): learned codebooks with error feedback, on the inputs that quantized blocks put out.

    for every block, first to last:
        H = E[x xᵀ] of its linears' inputs, on what the quantized blocks before it make of the text
        W_q = vectors of W in codebooks learned on the way                  lqer/rounding/vector.py
    at a rank above 0:  A·B = argmin_{rank r} || H^½ ((W − W_q)ᵀ − A·B) ||_F        QERA-exact's step

Its low-rank part is not the paper's, but QERA's closed form for the error that is left, as under GPTQ.
"""

from __future__ import annotations

from lqer.methods.base import Method
from lqer.methods.qera import full_hessian
from lqer.rounding import Vector
from lqer.statistics import Hessian

GPTVQ = Method("gptvq", full_hessian, frozenset({Hessian()}), propagate="quantized", rounding=Vector())
