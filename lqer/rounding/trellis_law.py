"""Errors that LDLQ makes in normal weights under a trellis code, drawn from their law instead of searched for.

Rotated weights are nearly normal, and so is T, what LDLQ rounds (ldlq.py): weights W and feedback F of later errors.
How a code errs then depends on the mean square v of T alone. In units of the root mean square that its scale fits,

    T − round(T) = ρ T + ε        E[(T − round(T))²] = d(v),   ρ = E[(T − round(T)) T] / v,   E[ε²] = d(v) − ρ² v

with an ε that is white and independent of T. d and ρ are measured once for a code, on normal numbers. The errors E of a
weight follow from those of T by H = 𝓛 D 𝓛ᵀ, and so does the feedback:

    E 𝓛 = T − round(T)        T = W + F,  F = E 𝓛 − E

Given draws of ε, E is found by iteration, from F = 0: feedback comes from later columns only, and is small beside W.
It costs a few products with 𝓛⁻¹, where a search waits for one block of columns after another. Weights of one shape are
taken at once, since a GPU would wait for the launches of small ones, such as experts'.

Shapes: L linears, S sampled rows, I in_features, B blocks of columns, N sizes of T, M numbers of each, R rows and C
columns of tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lqer.formats import Trellis
from lqer.formats.scales import root_mean_square
from lqer.formats.trellis import TILE
from lqer.rounding.factor import invert_lower_
from lqer.rounding.hessian import DampedHessian
from lqer.rounding.ldlq import feedback
from lqer.rounding.stack import stacked

# Root mean squares of T that a code is measured at, and the tiles of normal numbers that it is measured on.
SIZES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.7, 2.1)
TILES = 48
ITERATIONS = 6  # at 1 bit under strong feedback, what more of them change is 1 % of the loss; else three are enough


def drawn_errors(weights: Sequence[Tensor], hessians: Sequence[DampedHessian], number_format: Trellis) -> list[Tensor]:
    """Errors (S, I) of rows of each weight, float32, in the place of W − W_q under `ldlq`.

    weights: rows (S, I) of weights of one shape, each with the Hessian at its place. Two formats, or two weights of one
    shape, get the same draws: what differs between them is no chance.
    """
    weight_LSI = stacked(weights)
    size_L11 = root_mean_square(weight_LSI.flatten(1)).to(torch.float32)[:, None, None]
    unit_LSI = weight_LSI / size_L11.where(size_L11 != 0, 1.0)
    inverses = [damped.derived(_inverse_feedback) for damped in hessians]
    normal_SI = _normal(unit_LSI.shape[1:], unit_LSI.device)
    sizes_N, errors_N, slopes_N = response(number_format, unit_LSI.device)
    target_LSI, error_LSI = unit_LSI, torch.empty_like(unit_LSI)
    for _ in range(ITERATIONS):
        size_LB = target_LSI.unflatten(2, (-1, TILE)).square().mean((1, 3)).sqrt()
        error_LB, slope_LB = (_interpolated(size_LB, sizes_N, of_N) for of_N in (errors_N, slopes_N))
        spread_LB = (error_LB - (slope_LB * size_LB).square()).clamp_min(0).sqrt()
        slope_L1I, spread_L1I = (of_LB.repeat_interleave(TILE, 1).unsqueeze(1) for of_LB in (slope_LB, spread_LB))
        rounded_away_LSI = slope_L1I * target_LSI + spread_L1I * normal_SI
        # One by one: linears that share inputs share 𝓛⁻¹, and copies of it would be most of the memory.
        for rounded_away_SI, inverse_II, error_SI in zip(rounded_away_LSI, inverses, error_LSI, strict=True):
            torch.mm(rounded_away_SI, inverse_II, out=error_SI)
        target_LSI = unit_LSI + rounded_away_LSI - error_LSI
    return list((error_LSI * size_L11).unbind())


def _inverse_feedback(damped: DampedHessian) -> Tensor:
    """𝓛⁻¹ (I, I) of the damped H, float32: for `DampedHessian.derived`."""
    lower_II = feedback(damped, TILE)
    invert_lower_(lower_II)
    return lower_II


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
