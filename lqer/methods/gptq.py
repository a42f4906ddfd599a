"""GPTQ (arXiv 2210.17323): scalar rounding with error feedback and error propagation.

    for every block, first to last:
        H = E[x xᵀ] of its linears' inputs, computed by the quantized blocks before it
        W_q = gptq(W, H)                                                    lqer/rounding/gptq.py
    at a rank above 0:  A·B = argmin_{rank r} || H^½ ((W − W_q)ᵀ − A·B) ||_F        QERA-exact's step

GPTQ itself has no low-rank factors; these are QERA's closed form (arXiv 2410.06040) for the remaining error, under the
same H.
"""

from __future__ import annotations

from lqer.methods.qera import QeraExact
from lqer.rounding import Gptq


class GptqMethod(QeraExact):
    """GPTQ's rounding with error propagation; at a rank above 0, QERA-exact's A·B for what is left."""

    kind = "gptq"
    rounding = Gptq()
    propagate_error = True
