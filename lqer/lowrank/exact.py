"""The optimum by eigenvectors of the smaller Gram matrix in float64: the reference for other solvers.

For an error E (out x in) and a metric H = C·Cᵀ, the singular values σ and right singular vectors V of Cᵀ·Eᵀ give the
best product of rank r (Eckart-Young): A = Eᵀ V_r σ_r⁻¹, B = σ_r V_rᵀ, which is S⁻¹ U_r and σ_r V_rᵀ without a division
by S. Squaring halves the digits: the product is optimal to 1e-6 for scales that span five decades, and directions whose
singular value is below 1e-8 of the largest count as noise.

Shapes: I in_features, O out_features, R rank, K = min(I, O).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lqer.lowrank.metric import Metric

# Singular values below this fraction of the largest are noise of the Gram matrix in float64: its eigenvalues have an
# error of about 1e-16 of the largest, so singular values one of 1e-8.
RELATIVE_NOISE = 1e-8


def solve_exact(error_OI: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a_IR and b_RO, float64, and all K singular values of the weighted error, descending.

    rank: at most K. At rank K under a full H the product is the error itself, whatever the metric; it comes from the
    unweighted SVD, whose accuracy does not depend on small eigenvalues of H.
    """
    error_IO = error_OI.T.to(torch.float64)
    in_features, out_features = error_IO.shape
    full_metric = metric.hessian_II is not None
    if full_metric and rank == min(error_IO.shape):
        a_IR, b_RO, _ = solve_exact(error_OI, Metric(), rank)
        return a_IR, b_RO, singular_values(error_OI, metric)
    if out_features <= in_features:
        gram_OO = error_IO.T @ metric.times(error_IO) if full_metric else _gram(metric.root_times(error_IO))
        sigma_K, v_OK = _descending_eigh(gram_OO)
        v_OR, sigma_R = v_OK[:, :rank], sigma_K[:rank]
        return error_IO @ v_OR * _inverse(sigma_R, sigma_K), sigma_R[:, None] * v_OR.T, sigma_K
    weighted_IO = metric.root_times(error_IO)
    sigma_K, u_IK = _descending_eigh(_gram(weighted_IO.T))
    u_IR, sigma_R = u_IK[:, :rank], sigma_K[:rank]
    b_RO = u_IR.T @ weighted_IO
    if full_metric:
        return error_IO @ b_RO.T * _inverse(sigma_R, sigma_K).square(), b_RO, sigma_K
    a_IR = u_IR if metric.scale_I is None else u_IR / metric.scale_I.to(torch.float64)[:, None]
    return a_IR, b_RO, sigma_K


def singular_values(error_OI: Tensor, metric: Metric) -> Tensor:
    """All K singular values (float64, descending) of the weighted error; the square is the energy a rank captures."""
    error_IO = error_OI.T.to(torch.float64)
    if metric.hessian_II is not None and error_IO.shape[1] <= error_IO.shape[0]:
        gram_KK = error_IO.T @ metric.times(error_IO)
    else:
        weighted_IO = metric.root_times(error_IO)
        gram_KK = _gram(weighted_IO) if weighted_IO.shape[1] <= weighted_IO.shape[0] else _gram(weighted_IO.T)
    return torch.linalg.eigvalsh(gram_KK).flip(0).clamp(min=0).sqrt()


def _gram(x: Tensor) -> Tensor:
    return x.T @ x


def _inverse(sigma_R: Tensor, sigma_K: Tensor) -> Tensor:
    return torch.where(sigma_R > RELATIVE_NOISE * sigma_K[0], 1 / sigma_R, 0.0)


def _descending_eigh(gram_KK: Tensor) -> tuple[Tensor, Tensor]:
    """Square roots of the eigenvalues, largest first, and their eigenvectors in the columns."""
    eigenvalues_K, vectors_KK = torch.linalg.eigh(gram_KK)
    return eigenvalues_K.flip(0).clamp(min=0).sqrt(), vectors_KK.flip(1)
