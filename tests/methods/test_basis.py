"""Any method in another basis: it works there as it does anywhere, and gives a weight for the linear's own basis.

Shapes: I in_features, O out_features, T tokens.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lqer.formats import E8P, Int, MXInt, NonFiniteError, NumberFormat, Passthrough
from lqer.methods import METHODS, LinearPlan, LqerAct
from lqer.rounding import Gptq, Ldlq, Nearest, Rounding
from lqer.statistics import Hessian, MaxAbs, MeanAbs, MeanSquare
from lqer.transforms import Hadamard, Scheme

IN, OUT = 96, 48


@pytest.fixture
def x_TI() -> Tensor:
    """Correlated inputs with outlier channels."""
    generator = torch.Generator().manual_seed(0)
    mixing_II = torch.eye(IN) + 0.3 * torch.randn(IN, IN, generator=generator) / IN**0.5
    scale_I = torch.randn(IN, generator=generator).mul(0.7).exp()
    return torch.randn(2000, IN, generator=generator) @ mixing_II * scale_I


@pytest.fixture
def weight_OI() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 0.05 * torch.randn(OUT, IN, generator=generator) * torch.randn(IN, generator=generator).exp()


def statistics_of(x_TI: Tensor) -> dict[str, Tensor]:
    return {
        "mean_abs": x_TI.abs().mean(0),
        "mean_square": x_TI.square().mean(0),
        "hessian": x_TI.T @ x_TI / len(x_TI),
    }


def plan(method: str, weight: NumberFormat, rounding: Rounding, rank: int) -> LinearPlan:
    return LinearPlan(
        METHODS[method](),
        weight,
        rank=rank,
        factor=Passthrough("float32"),
        rounding=rounding,
        transform=Hadamard(),
        seed=3,
    )


@pytest.mark.parametrize(
    ("method", "weight", "rounding"),
    [
        ("none", E8P(2), Ldlq()),
        ("none", MXInt(3), Nearest()),
        ("lqer-svd", Int(3, 32), Gptq()),
        ("qera-exact", MXInt(3), Nearest()),
        ("qera-approx", E8P(2), Ldlq()),
        ("loftq", MXInt(3), Nearest()),
    ],
)
def test_it_is_the_method_on_the_transformed_linear_transformed_back(weight_OI, x_TI, method, weight, rounding):
    rotated = plan(method, weight, rounding, rank=0 if method == "none" else 8)
    rotation = Hadamard().rotation(OUT, IN, seed=3)
    input_II, output_OO = rotation.input(torch.eye(IN)).T, rotation.output(torch.eye(OUT)).T
    found = rotated.quantize(weight_OI, statistics_of(x_TI))
    there = replace(rotated, transform=None).quantize(rotation.weight(weight_OI), statistics_of(x_TI @ input_II.T))
    assert torch.equal(found.weight_OI.dequantize(), there.weight_OI.dequantize())
    expected_OI = output_OO @ there.effective_weight() @ input_II
    torch.testing.assert_close(found.effective_weight(), expected_OI, rtol=1e-4, atol=1e-5)


def test_the_statistics_are_those_of_the_transformed_inputs(x_TI):
    rotation = Hadamard().rotation(OUT, IN, seed=0)
    changed = rotation.statistics(statistics_of(x_TI), {Hessian(), MeanSquare(), MeanAbs()})
    expected = statistics_of(rotation.input(x_TI))
    torch.testing.assert_close(changed["hessian"].float(), expected["hessian"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(changed["mean_square"], expected["mean_square"], rtol=1e-4, atol=1e-5)
    # As far as sums over 96 inputs, some of them large, are normal.
    torch.testing.assert_close(changed["mean_abs"], expected["mean_abs"], rtol=0.06, atol=0.0)


def test_statistics_of_rotated_inputs_follow_from_the_hessian():
    act = plan("lqer-act", MXInt(3), Nearest(), rank=8)
    assert LqerAct().statistics_for(act) == {Hessian()}
    assert LqerAct().statistics_for(replace(act, rank=0)) == frozenset()
    rounded = replace(act.without_low_rank(), rounding=Ldlq())
    assert rounded.method.statistics_for(rounded) == {Hessian()}


def test_the_largest_magnitude_of_rotated_inputs_is_refused():
    reason = Hadamard().unsupported_reason(Scheme(MXInt(3), None, frozenset({MaxAbs(), Hessian()})))
    assert reason == "max_abs of rotated inputs does not follow from statistics of the inputs"


def test_lattice_codes_gain_from_a_basis_without_outliers(weight_OI, x_TI):
    weight_OI[:, ::16] *= 20
    rotated = plan("none", E8P(2), Nearest(), rank=0)
    errors = [
        (plan.quantize(weight_OI, {}).effective_weight() - weight_OI).norm()
        for plan in (rotated, replace(rotated, transform=None))
    ]
    assert errors[0] < 0.7 * errors[1]


def test_not_a_number_is_counted_before_it_spreads(weight_OI):
    weight_OI[3, 4] = torch.nan
    with pytest.raises(NonFiniteError, match="1 NaN and 0 infinite"):
        plan("none", MXInt(3), Nearest(), rank=0).quantize(weight_OI, {})


def test_signs_are_charged_a_bit_each(weight_OI):
    quantized = plan("none", E8P(2), Nearest(), rank=0).quantize(weight_OI, {})
    assert quantized.sign_bits == IN + OUT
    assert quantized.metadata_bits == quantized.weight_OI.metadata_bits + IN + OUT
