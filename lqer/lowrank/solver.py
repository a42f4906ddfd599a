"""The best rank-r approximation of a scaled error, without a full SVD.

For an error E (out x in) and a positive diagonal S, `reconstruct` minimises || S (Eᵀ − A·B) ||_F over A·B of rank r
(LQER, arXiv 2402.02446, section 3.2): with S·Eᵀ = U Σ Vᵀ the answer is A = S⁻¹ U_r, B = Σ_r V_rᵀ. U, Σ, V come from
the eigenvectors of the smaller Gram matrix in float64, which costs a fraction of an SVD. Squaring halves the digits:
the product is optimal to 1e-6 for scales that span five decades, and directions whose singular value lies below 1e-8 of
the largest are taken for noise.

Shapes: I in_features, O out_features, R rank, K = min(I, O).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Singular values below this share of the largest are noise of the Gram matrix in float64 (its eigenvalues carry an
# error of about 1e-16 of the largest, so singular values one of 1e-8).
RELATIVE_NOISE = 1e-8


@dataclass(frozen=True)
class Factors:
    """a_IR and b_RO, float32, with Eᵀ ≈ a_IR · b_RO; singular_values_K, float64, of the scaled error, descending."""

    a_IR: Tensor
    b_RO: Tensor
    singular_values_K: Tensor


def reconstruct(error_OI: Tensor, scale_I: Tensor | None, rank: int) -> Factors:
    """Minimise || diag(scale) (Eᵀ − A·B) ||_F over rank-`rank` products A·B.

    error_OI: float32, W − W_q. scale_I: float32, positive; None stands for ones. `rank` above min(I, O) is taken as
    min(I, O), where the product is exact. Returns Factors with R = min(rank, I, O).
    """
    rank = min(rank, *error_OI.shape)
    error_IO = error_OI.T.to(torch.float64)
    scaled_IO = error_IO if scale_I is None else error_IO * scale_I.to(torch.float64)[:, None]
    in_features, out_features = scaled_IO.shape
    if out_features <= in_features:
        sigma_K, v_OK = _descending_eigh(scaled_IO.T @ scaled_IO)
        v_OR, sigma_R = v_OK[:, :rank], sigma_K[:rank]
        inverse_R = torch.where(sigma_R > RELATIVE_NOISE * sigma_K[0], 1 / sigma_R, 0.0)
        # S⁻¹ U = S⁻¹ (S Eᵀ) V Σ⁻¹ = Eᵀ V Σ⁻¹: the scale is never divided by.
        a_IR = error_IO @ v_OR * inverse_R
        b_RO = sigma_R[:, None] * v_OR.T
    else:
        sigma_K, u_IK = _descending_eigh(scaled_IO @ scaled_IO.T)
        u_IR = u_IK[:, :rank]
        a_IR = u_IR if scale_I is None else u_IR / scale_I.to(torch.float64)[:, None]
        b_RO = u_IR.T @ scaled_IO
    return Factors(a_IR.to(torch.float32), b_RO.to(torch.float32), sigma_K)


def singular_values(error_OI: Tensor, scale_I: Tensor | None) -> Tensor:
    """Singular values (float64, descending) of E·diag(scale), for a look at how fast they fall."""
    scaled_OI = error_OI.to(torch.float64)
    if scale_I is not None:
        scaled_OI = scaled_OI * scale_I.to(torch.float64)
    out_features, in_features = scaled_OI.shape
    gram = scaled_OI @ scaled_OI.T if out_features <= in_features else scaled_OI.T @ scaled_OI
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()


def _descending_eigh(gram_KK: Tensor) -> tuple[Tensor, Tensor]:
    """Square roots of the eigenvalues, largest first, and their eigenvectors in the columns."""
    eigenvalues_K, vectors_KK = torch.linalg.eigh(gram_KK)
    return eigenvalues_K.flip(0).clamp(min=0).sqrt(), vectors_KK.flip(1)
