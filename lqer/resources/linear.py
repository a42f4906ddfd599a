"""Bytes that are held while one linear is quantized, next to the tensors and statistics of its block."""

from __future__ import annotations

from lqer.formats import Codebook
from lqer.lowrank.solver import SMALL_SIDE
from lqer.methods import LinearPlan

LINEAR_COPIES = 24  # bytes per weight: copies in float32 (21 of qera-exact, krylov, on an H200)
WIDE_COPIES = 40  # the same where an error is solved for in float64, or codes are learned as int64 indices
FACTORIZATION_COPIES = 3  # float64 matrices of an SVD or an eigenvalue decomposition


def linear_bytes(out_features: int, in_features: int, plan: LinearPlan, has_hessian: bool) -> int:
    """An estimate. has_hessian: whether E[x xᵀ] is a statistic of its inputs."""
    weights, shorter = out_features * in_features, min(out_features, in_features)
    is_exact = plan.rank != 0 and (plan.solver == "exact" or shorter <= SMALL_SIDE)
    copies = (WIDE_COPIES if is_exact or isinstance(plan.weight, Codebook) else LINEAR_COPIES) * weights
    copies += FACTORIZATION_COPIES * 8 * shorter**2 if is_exact else 0
    # Of the Hessian: the factor or metric that is kept in float32, or all that is held while it is made.
    kept, factored = (size * in_features**2 if has_hessian else 0 for size in (4, plan.hessian_bytes))
    return max(copies + kept, factored + 8 * weights) + plan.weight.encoding_bytes
