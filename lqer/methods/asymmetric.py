"""The asymmetric target: a weight that comes closest to the original's outputs on the quantized model's inputs.

x_o are the inputs of a linear in the original model, x those of the same tokens in the quantized one:

    H = E[x xᵀ],  M = E[(x_o - x) xᵀ]
    W* = argmin E‖W x_o - W* x‖² = W (H + M) H⁻¹
    damped:  W* = W + α W M (H + λ mean(diag H) 1)⁻¹,   λ = 0.02

GPTAQ (arXiv 2504.02692), QEP (2504.09629) and Qronos (2505.11695) have targets of this kind. W* then takes W's place in
rounding and reconstruction, under H. At α = 0 or M = 0 it is W. A large α follows the few tokens that drifted most.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lqer.rounding.hessian import damp
from lqer.statistics.symmetric import panels

DAMPING = 0.02


def asymmetric_target(weight_OI: Tensor, hessian_II: Tensor, mismatch_II: Tensor, strength: float) -> Tensor:
    """W*, float32.

    strength: α. Raises NonFiniteError for a Hessian that is not finite, HessianError for one that is not positive
    semi-definite.
    """
    damped = damp(hessian_II, DAMPING)
    wide_OI = weight_OI.to(torch.float64)
    drift_OI = torch.empty_like(wide_OI)
    for columns in panels(len(mismatch_II)):
        # `damp` divides H by its mean diagonal.
        drift_OI[:, columns] = wide_OI @ (mismatch_II[:, columns].to(torch.float64) / damped.mean)
    return weight_OI + strength * torch.cholesky_solve(drift_OI.T, damped.cholesky_II).T.to(torch.float32)
