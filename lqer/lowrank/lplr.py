"""LPLR: the best product of two rounded factors, by alternating least squares (arXiv 2310.11028; CALDERA, 2405.18886).

For a target Z, a metric H and a start A, in the project's letters (CALDERA's L is Bᵀ, its R is Aᵀ):

    repeat
        B = argmin tr(F H Fᵀ) = (Aᵀ H A)⁻¹ Aᵀ H Zᵀ,  F = Z − (A·B)ᵀ;    B = round(B)
        A = argmin tr(F H Fᵀ) = Zᵀ Bᵀ (B Bᵀ)⁻¹;                        A = round(A)
    take the rounded pair with the least error (the start is not among them)
    A = argmin once more for this B;  A = round(A) with error feedback on H, used where it is better

In the second line H cancels, as long as it is not singular. Errors are not monotone: rounding may undo the gain of
least squares. The last line is not part of CALDERA.

Shapes: I in_features, O out_features, R rank, L right-hand sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lqer.formats import QuantizedTensor
from lqer.lowrank.metric import Metric
from lqer.lowrank.precision import full_float32

Round = Callable[[Tensor], QuantizedTensor]

# Relative to the mean diagonal of a factor's Gram matrix, in float64: keeps a factor with equal columns solvable.
GRAM_DAMPING = 1e-10


@dataclass(frozen=True)
class RoundedFactors:
    """a_IR and b_RO as they are stored, tr(F H Fᵀ) for their product, and tr(Z H Zᵀ)."""

    a_IR: QuantizedTensor
    b_RO: QuantizedTensor
    energy: float
    target_energy: float


def lplr(
    target_OI: Tensor,
    metric: Metric,
    start_IR: Tensor,
    round_a: Round,
    round_b: Round,
    iterations: int,
    round_last_a: Round | None = None,
) -> RoundedFactors:
    """Minimise tr(F H Fᵀ) over rounded factors. target_OI, start_IR: float32; metric: not singular.

    round_a, round_b: from float32 (I, R) and (R, O) to their number formats; round_last_a: of A with error feedback, or
    None. iterations: at least 1.
    """
    with full_float32():
        fit = _Fit(target_OI, metric)
        a_IR = start_IR
        pairs: list[tuple[QuantizedTensor, QuantizedTensor]] = []
        energies: list[Tensor] = []
        for _ in range(iterations):
            b_stored = round_b(fit.b(a_IR))
            a_stored = round_a(fit.a(b_stored.dequantize()))
            a_IR = a_stored.dequantize()
            pairs.append((a_stored, b_stored))
            energies.append(fit.energy(a_IR, b_stored.dequantize()))
        # Looked at together: a GPU would be waited for at every one.
        least, best = min(zip(torch.stack(energies).tolist(), range(iterations), strict=True))
        (a_stored, b_stored), target_energy = pairs[best], float(fit.target_energy)
        if round_last_a is not None:
            b_RO = b_stored.dequantize()
            fed_back = round_last_a(fit.a(b_RO))
            energy = float(fit.energy(fed_back.dequantize(), b_RO))
            if energy < least:
                return RoundedFactors(fed_back, b_stored, energy, target_energy)
        return RoundedFactors(a_stored, b_stored, least, target_energy)


class _Fit:
    """Least squares for either factor, and the error of both."""

    def __init__(self, target_OI: Tensor, metric: Metric):
        self.target_OI, self.metric = target_OI, metric
        self.weighted_IO = metric.times(target_OI.T)
        self.target_energy = _dot(target_OI.T, self.weighted_IO)

    def b(self, a_IR: Tensor) -> Tensor:
        return _solve(a_IR.T @ self.metric.times(a_IR), a_IR.T @ self.weighted_IO)

    def a(self, b_RO: Tensor) -> Tensor:
        return _solve(b_RO @ b_RO.T, b_RO @ self.target_OI).T.contiguous()

    def energy(self, a_IR: Tensor, b_RO: Tensor) -> Tensor:
        """tr(F H Fᵀ) from products of the size of the factors; float32's accuracy relative to that of the target."""
        gram_RR = a_IR.T @ self.metric.times(a_IR)
        return self.target_energy - 2 * _dot(a_IR.T @ self.weighted_IO, b_RO) + _dot(gram_RR @ b_RO, b_RO)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dtype=torch.float64)


def _solve(gram_RR: Tensor, right_RL: Tensor) -> Tensor:
    """gram⁻¹ · right in float32, by a Cholesky factor in float64; by the pseudo-inverse where that fails."""
    gram_RR = gram_RR.to(torch.float64)
    damping = GRAM_DAMPING * gram_RR.diagonal().mean()
    identity_RR = torch.eye(len(gram_RR), dtype=gram_RR.dtype, device=gram_RR.device)
    cholesky_RR, failed = torch.linalg.cholesky_ex(gram_RR + damping * identity_RR)
    if failed:
        return (torch.linalg.pinv(gram_RR, hermitian=True) @ right_RL.to(torch.float64)).to(right_RL)
    return torch.cholesky_solve(right_RL.to(torch.float64), cholesky_RR).to(right_RL)
