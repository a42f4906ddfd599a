"""Errors drawn from their law against those that a search makes."""

from __future__ import annotations

import pytest
import torch

from lqer.formats import Trellis
from lqer.rounding import trellis_law
from lqer.rounding.hessian import DampedHessian
from lqer.rounding.ldlq import ldlq
from lqer.rounding.trellis_law import drawn_errors, response
from lqer.transforms.hadamard import random_hadamard

ROWS, COLUMNS = 64, 192


@pytest.fixture(scope="module")
def damped() -> DampedHessian:
    """Of rotated inputs, of which a few directions hold most of the energy."""
    generator = torch.Generator().manual_seed(1)
    mixing_II = torch.randn(COLUMNS, COLUMNS, generator=generator) * torch.linspace(-2, 1, COLUMNS).exp()
    x_TI = random_hadamard(COLUMNS, COLUMNS, 0).input(torch.randn(1000, COLUMNS, generator=generator) @ mixing_II.T)
    return DampedHessian(x_TI.T @ x_TI / len(x_TI))


def normal(size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2))


def loss(error_OI: torch.Tensor, damped: DampedHessian) -> float:
    """tr(E H Eᵀ)."""
    return float((error_OI.double() @ damped.hessian_II * error_OI.double()).sum())


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_they_cost_what_the_errors_of_a_search_cost(damped, bits):
    weight_OI = normal()
    (drawn_OI,) = drawn_errors([weight_OI], [damped], Trellis(bits))
    searched_OI = weight_OI - ldlq(weight_OI, damped, Trellis(bits)).dequantize()
    # Feedback is stronger than in rotated models, where the two differ by 2 %, as does the chance of 12288 errors.
    assert loss(drawn_OI, damped) == pytest.approx(loss(searched_OI, damped), rel=0.08)
    assert float(drawn_OI.square().sum()) == pytest.approx(float(searched_OI.square().sum()), rel=0.08)
    # Feedback matters here: without it errors would be those of the code alone.
    assert float(drawn_OI.square().mean()) > 1.2 * float(response(Trellis(bits), torch.device("cpu"))[1][1])


def test_they_are_in_the_unit_of_the_weight_and_nothing_where_it_is_zero(damped):
    large, small, nothing = drawn_errors([normal(size) for size in (50.0, 1.0, 0.0)], [damped] * 3, Trellis(2))
    torch.testing.assert_close(large, 50 * small, rtol=1e-4, atol=1e-3)
    assert not nothing.any()


def test_linears_taken_at_once_have_the_errors_of_each_alone(damped):
    other = DampedHessian(damped.hessian_II.flip(0, 1).contiguous())
    weights, hessians = [normal(), normal(3.0)[:, torch.randperm(COLUMNS)]], [damped, other]
    together = drawn_errors(weights, hessians, Trellis(2))
    alone = [drawn_errors([one], [its], Trellis(2))[0] for one, its in zip(weights, hessians, strict=True)]
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_formats_get_the_same_draws(damped):
    of_two, of_three = (drawn_errors([normal()], [damped], Trellis(bits))[0].flatten() for bits in (2, 3))
    assert torch.corrcoef(torch.stack((of_two, of_three)))[0, 1] > 0.9


@pytest.mark.parametrize("bits", [2, 3])
def test_a_codes_values_are_nearly_the_means_of_what_they_stand_for(bits):
    sizes_N, errors_N, slopes_N = response(Trellis(bits), torch.device("cpu"))
    at = trellis_law.SIZES.index(1.0)
    assert sizes_N[at] == 1
    # The bound is 4^-k.
    assert 4.0**-bits < errors_N[at] < 1.2 * 4.0**-bits
    assert float(slopes_N[at]) == pytest.approx(float(errors_N[at]), abs=0.01)
    # What is larger than the scale was fitted to overflows.
    assert (errors_N / sizes_N.square())[at:].diff().gt(0).all()
