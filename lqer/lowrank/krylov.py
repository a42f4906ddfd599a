"""The best low-rank product by a block Krylov method: matrix products only, no square root, no inverse, no SVD.

With E an error (out x in) and R the metric, the reconstruction needs the leading eigenvectors of M = E R Eᵀ (O, O). M
is never formed: a block of random vectors Q₀ is taken through v -> E·(R·(Eᵀ·v)) a few times, and the best
approximations in the space spanned by Q₀, M Q₀, M² Q₀, … are read off a small projected matrix (Rayleigh-Ritz; Musco
and Musco, arXiv 1504.05477, algorithm 2). With V the Ritz vectors and σ² the Ritz values, A = Eᵀ V σ⁻¹ and B = σ Vᵀ, so
A·B = Eᵀ V Vᵀ is a projection of Eᵀ whatever R is: a singular R or an E of low rank need no special care.

σ² are the energies that the product really captures. How much the optimum captures more is not known but estimated:
the energy captured by the spaces of the last three steps converges geometrically, and its limit is extrapolated. More
steps are taken until the estimate is small, both against what is captured and against what is left over: where the
optimum itself removes a twentieth of an error, its last percent is a two-thousandth of the loss.

Shapes: I in_features, O out_features, R rank, L block width, D dimension of the space so far.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lqer.lowrank.metric import Metric
from lqer.lowrank.precision import full_float32

# Vectors beyond the rank in every block; what the last wanted vectors converge by.
OVERSAMPLING = 16
# Products with M before the first look at the estimate, which needs three, and at most.
FIRST_STEPS = 3
MOST_STEPS = 8
# Stop once the optimum is estimated to capture less than this share more, and to lower the loss by less than that one.
GAP_TOLERANCE = 1e-2
LOSS_TOLERANCE = 6e-4
# Under a full R, which is asked for by methods that promise the optimum; its spectrum falls fast, so this is two steps.
FULL_METRIC_LOSS_TOLERANCE = 1e-6
# The extrapolated gains shrink at least by this factor a step; without a bound the sum of a stalled series is infinite.
SLOWEST_CONVERGENCE = 0.9


@dataclass(frozen=True)
class KrylovSolution:
    """a_IR and b_RO, float32; singular_values_R, float64, descending; gap: estimated (optimum − captured) / optimum."""

    a_IR: Tensor
    b_RO: Tensor
    singular_values_R: Tensor
    gap: float


def block_width(rank: int) -> int:
    return rank + OVERSAMPLING


def largest_space(rank: int) -> int:
    """Dimensions that a solution of that rank may need: the sides of E must be longer."""
    return block_width(rank) * (MOST_STEPS + 1)


def solve_krylov(error_OI: Tensor, metric: Metric, rank: int, seed: int) -> KrylovSolution:
    """error_OI: float32, (MOST_STEPS + 1)·(rank + 16) <= O. The start depends on `seed` alone, on every device."""
    out_features, width = error_OI.shape[0], block_width(rank)
    if largest_space(rank) > out_features:
        raise ValueError(f"rank {rank} needs {largest_space(rank)} rows, the error has {out_features}")
    generator = torch.Generator().manual_seed(seed)
    start_OL = torch.randn(out_features, width, generator=generator).to(error_OI.device)
    with full_float32():
        return _iterate(error_OI, metric, rank, start_OL)


def _iterate(error_OI: Tensor, metric: Metric, rank: int, start_OL: Tensor) -> KrylovSolution:
    tolerance = LOSS_TOLERANCE if metric.autocorrelation_II is None else FULL_METRIC_LOSS_TOLERANCE
    basis_OD, images_ID = (start_OL.new_empty(size, 0) for size in error_OI.shape)
    projected_DD = torch.empty(0, 0, dtype=torch.float64, device=error_OI.device)
    energy, captured, target_OL = 0.0, [], start_OL
    for step in range(MOST_STEPS + 1):
        block_OL = _orthonormal(target_OL, basis_OD)
        image_IL = error_OI.T @ block_OL
        weighted_IL = metric.times(image_IL)
        basis_OD = torch.cat([basis_OD, block_OL], dim=1)
        images_ID = torch.cat([images_ID, image_IL], dim=1)
        projected_DD = _bordered(projected_DD, images_ID.T @ weighted_IL)
        if step == 0:
            # A random orthonormal block is an unbiased sample of M's trace.
            energy = float(projected_DD.trace()) * len(start_OL) / start_OL.shape[1]
        if step >= FIRST_STEPS - 2:
            captured.append(float(torch.linalg.eigvalsh(projected_DD)[-rank:].sum()))
        if step >= FIRST_STEPS:
            missed = _missed(*captured[-3:])
            enough = missed <= GAP_TOLERANCE * captured[-1] and missed <= tolerance * max(energy - captured[-1], 0.0)
            if enough or step == MOST_STEPS:
                break
        target_OL = error_OI @ weighted_IL
    ritz_D, vectors_DD = torch.linalg.eigh(projected_DD)
    energies_R = ritz_D.flip(0)[:rank].clamp(min=0)
    vectors_DR = vectors_DD.flip(1)[:, :rank].to(torch.float32)
    sigma_R = energies_R.sqrt()
    noise = torch.finfo(torch.float32).eps * energies_R[0]
    inverse_R = torch.where(energies_R > noise, 1 / sigma_R, 0.0).to(torch.float32)
    a_IR = images_ID @ vectors_DR * inverse_R
    b_RO = sigma_R.to(torch.float32)[:, None] * (basis_OD @ vectors_DR).T
    return KrylovSolution(a_IR, b_RO, sigma_R, missed / (captured[-1] + missed) if captured[-1] > 0 else 0.0)


def _bordered(projected_DD: Tensor, columns_DL: Tensor) -> Tensor:
    """The projected matrix of a space that has grown by the last L rows of `columns_DL`, symmetric."""
    columns_DL = columns_DL.to(torch.float64)
    size, width = len(projected_DD), columns_DL.shape[1]
    grown_DD = torch.empty(size + width, size + width, dtype=torch.float64, device=projected_DD.device)
    grown_DD[:size, :size] = projected_DD
    grown_DD[:, size:] = columns_DL
    grown_DD[size:, :size] = columns_DL[:size].T
    corner_LL = columns_DL[size:]
    grown_DD[size:, size:] = (corner_LL + corner_LL.T) / 2
    return grown_DD


def _orthonormal(block_OL: Tensor, basis_OD: Tensor) -> Tensor:
    """An orthonormal block that spans, beside the basis, what `block_OL` adds to it.

    Twice, since the first pass leaves rounding noise; where the block adds nothing, QR fills in directions of its own,
    which the second pass takes out of the basis as well.
    """
    for _ in range(2):
        block_OL = block_OL - basis_OD @ (basis_OD.T @ block_OL)
        block_OL, _ = torch.linalg.qr(block_OL)
    return block_OL


def _missed(before: float, last: float, now: float) -> float:
    """How much the limit of the energies captured after the last three steps lies above the last of them."""
    gained, gained_before = now - last, last - before
    if gained <= 0:
        return 0.0
    ratio = min(gained / max(gained_before, gained), SLOWEST_CONVERGENCE)
    return gained * ratio / (1 - ratio)
