"""What rounding and reconstructing single linears hold and take."""

from __future__ import annotations

from lqer.lowrank.krylov import largest_space, least_space
from lqer.lowrank.rank_allocation import factor_bits
from lqer.lowrank.solver import SMALL_SIDE
from lqer.methods import Caldera, LinearPlan
from lqer.resources.workload import Workload, planned
from lqer.stages.quantize import with_spectra
from lqer.statistics import Hessian

# Copies of the linear that is worked on, of 4 and of 8 bytes a weight; guesses.
SINGLE_COPIES, DOUBLE_COPIES = 6, 2
# Passes of elementwise work over a weight: scales, codes, values.
ROUNDING_PASSES = 24
# Float64 eigenvectors, in terms of n³ products of float32; they run far below the rate of products.
EIGEN_COST = 60
# Error feedback goes from column to column: operations on one of them, counted on each rounding (14 to 39).
CALLS_A_COLUMN = 22
# Of linears whose rank a budget chooses.
ASSUMED_RANK = 32


def packed_bytes(work: Workload, name: str, plan: LinearPlan | None) -> int:
    out_features, in_features = work.summary.linears[name]
    if plan is None:
        return out_features * in_features * (work.stored_in_blocks or work.stored)
    bits = plan.weight.bits_per_value(in_features) * out_features * in_features
    budget = work.config.quantize.low_rank.budget_bits
    if plan.rank is None and budget is not None:
        return int(budget * out_features * in_features / 8)
    rank = min(plan.rank or 0, in_features, out_features)
    return int(bits + factor_bits(plan.factor_formats, plan.factor_axes, in_features, out_features, rank)) // 8


def _is_iterated(plan: LinearPlan, rank: int, shorter: int) -> bool:
    """Whether lqer/lowrank/solver.py takes krylov."""
    wanted = plan.solver == "krylov" or (plan.solver == "auto" and shorter > SMALL_SIDE)
    return wanted and (2 if plan.solver == "auto" else 1) * largest_space(rank) <= shorter


def linear_work(work: Workload) -> int:
    """The most that is held beside a block's tensors and statistics while one linear is worked on."""
    sizes = [0]
    for _, out_features, in_features, plan in planned(work):
        weights, shorter = out_features * in_features, min(out_features, in_features)
        size = (4 * SINGLE_COPIES + 8 * DOUBLE_COPIES) * weights + 3 * 8 * shorter**2
        needs_hessian = Hessian() in plan.method.statistics_for(plan)
        exact = plan.rank is None or (plan.rank > 0 and not _is_iterated(plan, plan.rank, shorter))
        # A factor of R in float64: for error feedback, or for the exact solution under it.
        if needs_hessian and (exact or plan.rounding.statistics):
            size += 3 * 8 * in_features**2
        sizes.append(size)
    return max(sizes)


def solving(work: Workload) -> tuple[float, float, float]:
    """FLOPs, bytes moved and calls of rounding and reconstructing every linear, and of the spectra kept of some."""
    kept = work.config.calibration.error_tokens
    drawn = with_spectra(work.summary.blocks)
    repeats = 1 + ("plain" in work.config.evaluation.baselines)
    flops = moved = calls = 0.0
    for block, out_features, in_features, plan in planned(work):
        weights, shorter = out_features * in_features, min(out_features, in_features)
        rank = ASSUMED_RANK if plan.rank is None else min(plan.rank, shorter)
        full = Hessian() in plan.method.statistics and rank > 0
        flops += repeats * 8.0 * kept * weights
        moved += repeats * plan.iterations * ROUNDING_PASSES * 4.0 * weights
        if plan.rounding.statistics:
            sweeps = (plan.iterations + repeats - 1) * plan.rounding.sweeps
            flops += repeats * 2.0 * in_features**3 + sweeps * 2.0 * in_features * weights
            calls += sweeps * CALLS_A_COLUMN * in_features
        if isinstance(plan.method, Caldera) and rank > 0:
            # Both factors by alternating least squares, the last A column after column (lqer/lowrank/lplr.py).
            turns = plan.iterations * plan.method.lplr_iterations
            flops += turns * rank * 4.0 * (weights + in_features**2)
            calls += plan.iterations * CALLS_A_COLUMN * in_features
        if block in drawn:
            flops += repeats * 2 * (4.0 * shorter * weights + EIGEN_COST * shorter**3)
        if rank > 0 and _is_iterated(plan, rank, shorter):
            product = 4.0 * weights + (2.0 * in_features**2 if full else 0.0)
            flops += plan.iterations * least_space(rank) * product
            # The energy of the error, for the share that is captured.
            flops += 2.0 * in_features * weights if full else 0.0
        elif rank > 0:
            roots = 4.0 * in_features * weights + EIGEN_COST * in_features**3 if full else 0.0
            flops += plan.iterations * (4.0 * shorter * weights + EIGEN_COST * shorter**3 + roots)
        if plan.rank is None:
            flops += 4.0 * shorter * weights + EIGEN_COST * shorter**3
    return flops, moved, calls
