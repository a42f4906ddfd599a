"""LoftQ (arXiv 2310.08659, algorithm 1).

    A·B = 0
    repeat T times:
        W_q = round(W − (A·B)ᵀ)
        A·B = argmin_{rank r} || (W − W_q)ᵀ − A·B ||_F

One iteration is LQER with S = I. The weight error decreases with T; the output error need not.
"""

from __future__ import annotations

from lqer.methods.base import Method

# The published figures go up to 5 iterations; the published code defaults to 1.
ITERATIONS = 5


class LoftQ(Method):
    """LoftQ (arXiv 2310.08659): rounding and truncated SVD in turn."""

    kind = "loftq"
    iterations = ITERATIONS
