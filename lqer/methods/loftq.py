"""LoftQ (arXiv 2310.08659, algorithm 1).

    A·B = 0
    repeat T times:
        W_q = round(W − (A·B)ᵀ)
        A·B = argmin_{rank r} || (W − W_q)ᵀ − A·B ||_F

One iteration is LQER's plain SVD. The error of the weight falls with T, the error at the output need not.
"""

from __future__ import annotations

from lqer.methods.base import Method
from lqer.methods.lqer import identity

# What the published figures go to; the published code defaults to 1.
ITERATIONS = 5

LOFTQ = Method("loftq", identity, iterations=ITERATIONS)
