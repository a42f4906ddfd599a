"""A weight and a Hessian of correlated inputs, and the loss that roundings are judged by."""

import pytest
import torch


@pytest.fixture(scope="session")
def make_layer():
    """`make_layer(O, I, seed=0)`: weight_OI float32, hessian_II float64 of inputs that share half as many factors."""

    def make(out_features: int, in_features: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        weight_OI = normal(out_features, in_features) * (0.3 * normal(in_features)).exp()
        mixing_II = normal(in_features // 2, in_features) / in_features**0.5
        x_TI = normal(4 * in_features, in_features // 2) @ mixing_II + 0.3 * normal(4 * in_features, in_features)
        return weight_OI.float(), x_TI.T @ x_TI

    return make


@pytest.fixture(scope="session")
def loss():
    """`loss(quantized, weight_OI, hessian_II)`: tr(E H Eᵀ) / tr(W H Wᵀ)."""

    def relative(quantized, weight_OI, hessian_II) -> float:
        weight_OI = weight_OI.double()
        error_OI = quantized.dequantize().double() - weight_OI
        return float(((error_OI @ hessian_II) * error_OI).sum() / ((weight_OI @ hessian_II) * weight_OI).sum())

    return relative
