"""GPTVQ (arXiv 2402.15319): learned codebooks with error feedback and error propagation.

    for every block, first to last:
        H = E[x xᵀ] of its linears' inputs, computed by the quantized blocks before it
        W_q = vectors of W, codebooks learned group by group                 lqer/rounding/vector.py
    at a rank above 0:  A·B = argmin_{rank r} || H^½ ((W − W_q)ᵀ − A·B) ||_F        QERA-exact's step

The low-rank factors are not part of the paper: QERA's closed form for the remaining error, as under GPTQ.
"""

from __future__ import annotations

from lqer.methods.qera import QeraExact
from lqer.rounding import Vector


class GptvqMethod(QeraExact):
    """GPTVQ's rounding with error propagation; at a rank above 0, QERA-exact's A·B for what is left."""

    kind = "gptvq"
    rounding = Vector()
    propagate_error = True
