"""Inputs as a quantized linear rounds them, against the linear itself."""

import pytest
import torch

from lqer.formats import Int, MXInt
from lqer.methods import LinearPlan, Method
from lqer.methods.base import RoundingOnly
from lqer.methods.inputs import InputRounding
from lqer.nn.linear import HadamardLinear, QuantizedLinear
from lqer.transforms.hadamard import Hadamard


@pytest.fixture
def x_NI():
    return torch.randn(40, 48, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 49)


@pytest.mark.parametrize("activation", [MXInt(4), MXInt(8, 32), Int(8, "row", symmetric=True)], ids=str)
def test_a_float_weight_on_rounded_inputs_is_the_layer_that_rounds_them(x_NI, activation):
    weight_OI = torch.randn(20, 48, generator=torch.Generator().manual_seed(1))
    layer = QuantizedLinear(weight_OI, None, None, None, activation)
    assert torch.equal(InputRounding(activation).round(x_NI) @ weight_OI.T, layer(x_NI))


def test_rotated_inputs_are_rounded_in_the_rotated_basis_and_rotated_back(x_NI):
    weight_OI = torch.randn(20, 48, generator=torch.Generator().manual_seed(1))
    rotation = Hadamard().rotation(20, 48, seed=3)
    inner = QuantizedLinear(rotation.weight(weight_OI), None, None, None, MXInt(4))
    rounded_NI = InputRounding(MXInt(4), Hadamard(), seed=3).round(x_NI)
    y_NO = HadamardLinear(inner, rotation, None)(x_NI)
    torch.testing.assert_close(rounded_NI @ weight_OI.T, y_NO, rtol=1e-4, atol=1e-2)
    assert not torch.allclose(rounded_NI, MXInt(4).fake_quantize(x_NI), atol=0.1)
    # In the rotated basis the values are those of the format again.
    rotated_NI = rotation.input(rounded_NI)
    torch.testing.assert_close(rotated_NI, MXInt(4).fake_quantize(rotation.input(x_NI)), rtol=1e-4, atol=1e-3)


def test_a_plan_says_how_its_inputs_are_rounded():
    method: Method = RoundingOnly()
    assert LinearPlan(method, MXInt(4)).input_rounding is None
    plan = LinearPlan(method, MXInt(4), activation=MXInt(8), transform=Hadamard(), seed=7)
    assert plan.input_rounding == InputRounding(MXInt(8), Hadamard(), 7)
