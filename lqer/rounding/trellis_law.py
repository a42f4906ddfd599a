"""Errors that LDLQ makes in normal weights under a trellis code, drawn from their law instead of searched for.

Rotated weights are nearly normal, and so is T, what LDLQ rounds (ldlq.py): weights W and feedback F of later errors.
How a code errs then depends on the mean square v of T alone. In units of the root mean square that its scale fits,

    T − round(T) = ρ T + ε        E[(T − round(T))²] = d(v),   ρ = E[(T − round(T)) T] / v,   E[ε²] = d(v) − ρ² v

with an ε that is white and independent of T. d and ρ are measured once for a code, on normal numbers. The errors E of a
weight follow from those of T by H = 𝓛 D 𝓛ᵀ, and so does the feedback:

    E 𝓛 = T − round(T)        T = W + F,  F = E 𝓛 − E

Given draws of ε, E is found by iteration, from F = 0: feedback comes from later columns only, and is small beside W.
It costs a few triangular solves with the sampled rows, where a search waits for one block of columns after another.

Shapes: S sampled rows, I in_features, B blocks of columns, N sizes of T, M numbers of each, R rows and C columns of
tiles.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lqer.formats import Trellis
from lqer.formats.scales import root_mean_square
from lqer.formats.trellis import TILE
from lqer.rounding.hessian import DampedHessian
from lqer.rounding.ldlq import feedback

# Root mean squares of T that a code is measured at, and the tiles of normal numbers that it is measured on.
SIZES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.7, 2.1)
TILES = 48
ITERATIONS = 6  # at 1 bit under strong feedback, what more of them change is 1 % of the loss; else three are enough


def drawn_errors(weight_SI: Tensor, damped: DampedHessian, number_format: Trellis) -> Tensor:
    """Errors (S, I) of rows of a weight, float32, in the place of W − W_q under `ldlq`.

    Two formats, or two weights of one shape, get the same draws: what differs between them is no chance.
    """
    size = root_mean_square(weight_SI.flatten()).to(torch.float32)
    unit_SI = weight_SI / size.where(size != 0, 1.0)
    lower_II = damped.derived(feedback, TILE)
    normal_SI = _normal(unit_SI.shape, unit_SI.device)
    sizes_N, errors_N, slopes_N = response(number_format, unit_SI.device)
    target_SI = unit_SI
    for _ in range(ITERATIONS):
        size_B = target_SI.unflatten(1, (-1, TILE)).square().mean((0, 2)).sqrt()
        error_B, slope_B = (_interpolated(size_B, sizes_N, of_N) for of_N in (errors_N, slopes_N))
        spread_B = (error_B - (slope_B * size_B).square()).clamp_min(0).sqrt()
        slope_I, spread_I = slope_B.repeat_interleave(TILE), spread_B.repeat_interleave(TILE)
        rounded_away_SI = slope_I * target_SI + spread_I * normal_SI
        error_SI = torch.linalg.solve_triangular(lower_II, rounded_away_SI, upper=False, left=False, unitriangular=True)
        target_SI = unit_SI + rounded_away_SI - error_SI
    return error_SI * size


@lru_cache
def response(number_format: Trellis, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Root mean squares of T (N,), and at each d and ρ, float32, under the scale that fits a root mean square of 1."""
    normal_RC = _normal(torch.Size((TILE, TILE * TILES)), device)
    unit_RC = normal_RC / root_mean_square(normal_RC.flatten()).to(torch.float32)
    scales = number_format.fit(unit_RC.unsqueeze(1))
    x_R1C = torch.cat([size * unit_RC for size in SIZES]).unsqueeze(1)
    error_NM = (x_R1C - number_format.decode(number_format.encode(x_R1C, scales), scales)).view(len(SIZES), -1)
    x_NM = x_R1C.view(len(SIZES), -1)
    slopes_N = (error_NM * x_NM).mean(1) / x_NM.square().mean(1)
    return torch.tensor(SIZES, device=device), error_NM.square().mean(1), slopes_N


def _interpolated(at_B: Tensor, points_N: Tensor, values_N: Tensor) -> Tensor:
    """Linear between points in ascending order, constant beyond them."""
    at_B = at_B.clamp(points_N[0], points_N[-1])
    right_B = torch.bucketize(at_B, points_N).clamp(1, len(points_N) - 1)
    left_B = right_B - 1
    part_B = (at_B - points_N[left_B]) / (points_N[right_B] - points_N[left_B])
    return values_N[left_B] + part_B * (values_N[right_B] - values_N[left_B])


@lru_cache(maxsize=4)
def _normal(shape: torch.Size, device: torch.device) -> Tensor:
    """Drawn on the CPU, so that they are the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
