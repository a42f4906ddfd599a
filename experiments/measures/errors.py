"""What rounding a weight loses at its linear's output.

Shapes: I in_features, O out_features.
"""

from __future__ import annotations

from torch import Tensor


def relative_error(weight_OI: Tensor, effective_OI: Tensor, hessian_II: Tensor) -> float:
    """tr(F H Fᵀ) / tr(W H Wᵀ) in float64, F what the effective weight differs from W by; H = E[x xᵀ] of the inputs."""
    weight_OI, hessian_II = weight_OI.double(), hessian_II.double()
    error_OI = weight_OI - effective_OI.double()
    return float((error_OI @ hessian_II * error_OI).sum() / (weight_OI @ hessian_II * weight_OI).sum())
