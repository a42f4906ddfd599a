"""Layers that vector quantization is tested on."""

from __future__ import annotations

import torch
from torch import Tensor

from lqer.formats import Codebook, QuantizedTensor
from lqer.rounding import Vector


def student_layer(out_features: int = 64, in_features: int = 256, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight of student-t values (5 degrees of freedom) and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight_OI = 0.02 * normal(out_features, in_features) / normal(5, out_features, in_features).square().mean(0).sqrt()
    mixing_II = torch.logspace(0, -1, in_features)[:, None] * normal(in_features, in_features) / in_features**0.5
    x_TI = normal(4 * in_features, in_features) @ mixing_II + 0.2 * normal(4 * in_features, in_features)
    x_TI *= (0.5 * normal(in_features)).exp()
    return weight_OI, x_TI.T @ x_TI / len(x_TI)


def loss(weight_OI: Tensor, hessian_II: Tensor, quantized_OI: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T), in float64."""
    weight_OI, hessian_II = weight_OI.double(), hessian_II.double()
    error_OI = weight_OI - quantized_OI.double()
    return float((error_OI @ hessian_II * error_OI).sum() / (weight_OI @ hessian_II * weight_OI).sum())


def round_vector(weight_OI: Tensor, hessian_II: Tensor, number_format: Codebook, **settings) -> QuantizedTensor:
    """GPTVQ with these settings, on a layer of that Hessian."""
    return Vector(**settings).round(weight_OI, {"hessian": hessian_II}, number_format)
