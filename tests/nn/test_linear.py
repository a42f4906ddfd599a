"""The quantized linear against its formula in float64, and the two measures of error.

Shapes: T tokens, I in_features, O out_features, R rank.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lqer.formats import MXInt, Passthrough
from lqer.nn.linear import HadamardLinear, QuantizedLinear, output_error, weight_error
from lqer.transforms.hadamard import RandomHadamard, random_hadamard

IN, OUT, RANK = 48, 20, 5


def integers(*shape: int, unit: float = 1.0) -> Tensor:
    """Small integers times a power of two: sums of their products are exact in float32."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape))) * unit


@pytest.fixture
def parts() -> dict[str, Tensor]:
    return {
        "weight_OI": integers(OUT, IN, unit=2.0**-4),
        "bias_O": integers(OUT, unit=0.25),
        "a_IR": integers(IN, RANK, unit=2.0**-3),
        "b_RO": integers(RANK, OUT, unit=2.0**-5),
    }


@pytest.fixture
def x() -> Tensor:
    return integers(2, 7, IN, unit=2.0**-3)


@pytest.mark.parametrize("bits", [3, 6])
def test_the_branch_is_rounded_after_each_of_its_products(parts, x, round_mxint, bits):
    layer = QuantizedLinear(**parts, activation=MXInt(bits))
    w, b, a, b_low = (tensor.double() for tensor in parts.values())
    x_q = round_mxint(x, bits)
    expected = x_q @ w.T + b + round_mxint(round_mxint(x_q @ a, bits) @ b_low, bits)
    assert torch.equal(layer(x).double(), expected)
    unrounded = x.double() @ (w.T + a @ b_low) + b
    assert not torch.allclose(expected, unrounded, atol=1e-2)


@pytest.mark.parametrize("activation", [None, Passthrough("float32")])
def test_without_activation_rounding_it_is_the_effective_weight(parts, x, activation):
    layer = QuantizedLinear(**parts, activation=activation)
    w, b, a, b_low = (tensor.double() for tensor in parts.values())
    assert torch.equal(layer(x).double(), x.double() @ (w.T + a @ b_low) + b)


def test_bias_and_branch_may_be_absent(parts, x):
    layer = QuantizedLinear(parts["weight_OI"], None, None, None, activation=None)
    assert torch.equal(layer(x), x @ parts["weight_OI"].T)


def test_tokens_do_not_influence_one_another(parts, x):
    layer = QuantizedLinear(**parts, activation=MXInt(4))
    whole = layer(x)
    assert torch.equal(torch.stack([torch.stack([layer(token) for token in row]) for row in x]), whole)


def test_its_tensors_follow_the_model_and_are_all_in_its_state_dict(parts):
    layer = QuantizedLinear(**parts, activation=None)
    assert layer.state_dict().keys() == {"weight", "bias", "low_rank_a", "low_rank_b"}
    assert {tensor.dtype for tensor in layer.to(torch.bfloat16).buffers()} == {torch.bfloat16}


@pytest.fixture
def basis() -> RandomHadamard:
    return random_hadamard(OUT, IN, seed=0)


@pytest.mark.parametrize("activation", [None, MXInt(6)])
def test_in_another_basis_all_that_is_rounded_is_rounded_there(parts, x, basis, round_mxint, activation):
    w, b, a, b_low = parts.values()
    layer = HadamardLinear(QuantizedLinear(w, None, a, b_low, activation), basis, b)
    rounded = (lambda x: round_mxint(x, 6)) if activation else (lambda x: x.double())
    x_there = rounded(basis.input(x))
    w, b, a, b_low = (tensor.double() for tensor in parts.values())
    y_there = x_there @ w.T + rounded(rounded(x_there @ a) @ b_low)
    torch.testing.assert_close(layer(x).double(), basis.output(y_there) + b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotated_linear_tells_the_dtype_of_its_weight(parts, basis, dtype):
    w, b, *_ = parts.values()
    layer = HadamardLinear(QuantizedLinear(w, None, None, None, None), basis, b).to(dtype)
    assert (layer.weight.shape, layer.weight.dtype) == (w.shape, dtype)
    assert layer.weight.is_meta


def test_what_gathers_in_one_element_does_not_overflow_float16(basis):
    # V x of the first row of V is one element of length ‖x‖.
    x_I = 20000.0 * IN**0.5 * basis.input(torch.eye(IN))[:, 0]
    weight_OI = 2.0**-6 * torch.eye(OUT, IN)
    layer = HadamardLinear(QuantizedLinear(weight_OI, None, None, None, None), basis, None)
    assert basis.input(x_I)[0] > torch.finfo(torch.float16).max
    y_O = layer.half()(x_I.half())
    torch.testing.assert_close(y_O.float(), layer.float()(x_I), rtol=5e-3, atol=1.0)


def test_output_error_is_the_share_of_the_outputs_energy():
    torch.manual_seed(0)
    weight_OI, quantized_OI, sample_SI = torch.randn(6, 4), torch.randn(6, 4), torch.randn(9, 4)
    y, y_q = sample_SI.double() @ weight_OI.double().T, sample_SI.double() @ quantized_OI.double().T
    expected = float((y - y_q).square().sum() / y.square().sum())
    assert output_error(weight_OI, quantized_OI, sample_SI) == pytest.approx(expected, rel=1e-5)
    assert output_error(weight_OI, quantized_OI, sample_SI.to(torch.bfloat16)) == pytest.approx(expected, rel=2e-2)


def test_weight_error_is_a_ratio_of_norms():
    weight_OI = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert weight_error(weight_OI, torch.zeros(2, 2)) == 1
    assert weight_error(weight_OI, weight_OI + torch.tensor([[0.5, 0.0], [0.0, 0.0]])) == pytest.approx(0.1)


def test_errors_of_nothing_are_zero():
    zeros = torch.zeros(3, 4)
    assert output_error(zeros, zeros, torch.ones(2, 4)) == 0
    assert weight_error(zeros, zeros) == 0


def test_gradients_pass_straight_through_the_rounding_of_activations(parts, x):
    """Those of the products that were made: of rounded inputs, weights and factors."""
    x = x.clone().requires_grad_()
    layer = QuantizedLinear(**parts, activation=MXInt(3))
    factor = layer.low_rank_a.requires_grad_()
    layer(x).sum().backward()
    weight_OI, b_RO = parts["weight_OI"], parts["b_RO"]
    expected_I = weight_OI.sum(0) + (factor.detach() @ b_RO).sum(1)
    torch.testing.assert_close(x.grad, expected_I.expand_as(x))
    rounded_TI = MXInt(3).fake_quantize(x.detach()).flatten(0, 1)
    torch.testing.assert_close(factor.grad, rounded_TI.sum(0)[:, None] * b_RO.sum(1))
