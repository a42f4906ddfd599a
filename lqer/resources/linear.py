"""Bytes that are held while linears are quantized, next to the tensors and statistics of their block: one, or several
experts at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch

from lqer.formats import Codebook
from lqer.lowrank.krylov import largest_space
from lqer.lowrank.krylov_graphs import LARGEST_RECORDED, MOST_RECORDINGS
from lqer.lowrank.solver import SMALL_SIDE, uses_krylov
from lqer.methods import LinearPlan
from lqer.stages.alike import BATCH_BYTES, HESSIAN_BYTES, WEIGHT_BYTES

LINEAR_COPIES = 24  # bytes per weight: copies in float32 (21 of qera-exact, krylov, on an H200)
WIDE_COPIES = 40  # the same where an error is solved for in float64, or codes are learned as int64 indices
FACTORIZATION_COPIES = 3  # float64 matrices of an SVD or an eigenvalue decomposition


def linear_bytes(out_features: int, in_features: int, plan: LinearPlan, has_hessian: bool) -> int:
    """An estimate. has_hessian: whether E[x xᵀ] is a statistic of its inputs."""
    weights, shorter = out_features * in_features, min(out_features, in_features)
    is_exact = plan.rank != 0 and (plan.solver == "exact" or shorter <= SMALL_SIDE)
    copies = (WIDE_COPIES if is_exact or isinstance(plan.weight, Codebook) else LINEAR_COPIES) * weights
    copies += FACTORIZATION_COPIES * 8 * shorter**2 if is_exact else 0
    # What the Hessian takes: the factor or metric that is kept in float32, or all that is held while it is made.
    kept, factored = (size * in_features**2 if has_hessian else 0 for size in (4, plan.hessian_bytes))
    return max(copies + kept, factored + 8 * weights) + plan.weight.encoding_bytes


def recorded_bytes(planned: Iterable[tuple[int, int, LinearPlan]], has_hessian: bool) -> int:
    """Bytes of all that is recorded on a GPU for Krylov spaces; planned: (out_features, in_features, plan)."""
    kinds = {}
    for out_features, in_features, plan in planned:
        read = 4 * in_features * (out_features + (in_features if has_hessian else 1))
        if plan.rank and uses_krylov(plan.solver, min(out_features, in_features), plan.rank, torch.device("cuda")):
            space = largest_space(plan.rank) * (8 * out_features + 4 * in_features)
            kinds[out_features, in_features, plan.rank] = read + space if read <= LARGEST_RECORDED else 0
    return sum(sorted(kinds.values(), reverse=True)[:MOST_RECORDINGS])


def batch_bytes(linears: Mapping[str, tuple[int, int]], blocks_name: str, device: str) -> int:
    """The most bytes of experts that are quantized at once; 0 without experts.

    linears: (out_features, in_features) by full names, those of an expert `<layer>.<number>.<linear>`.
    """
    of_layers: Counter[str] = Counter()
    for name, (out_features, in_features) in linears.items():
        if is_of_expert(name, blocks_name):
            layer = name.rsplit(".", 2)[0]
            of_layers[layer] += in_features * (HESSIAN_BYTES * in_features + WEIGHT_BYTES * out_features)
    return min(max(of_layers.values(), default=0), BATCH_BYTES[device])


def is_of_expert(linear: str, blocks_name: str) -> bool:
    """Whether a full name is that of a linear of an expert: it has a number that is not that of its block."""
    layer, number, _ = linear.rsplit(".", 2)
    return number.isdigit() and layer != blocks_name
