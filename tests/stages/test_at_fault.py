"""Errors with the name of the linear that they belong to."""

from __future__ import annotations

import pytest

from lqer.errors import ModelError
from lqer.formats import NonFiniteError
from lqer.rounding.hessian import HessianError
from lqer.stages.at_fault import named, one_named


@pytest.mark.parametrize("error", [NonFiniteError("1 NaN"), HessianError("1 NaN")])
def test_an_error_of_a_linear_carries_its_name(error):
    with pytest.raises(ModelError, match=r"^layers\.0\.q_proj: 1 NaN$"), named("layers.0.q_proj"):
        raise error


def test_an_error_that_is_not_of_a_linears_values_stays_as_it_is():
    with pytest.raises(ZeroDivisionError), named("layers.0.q_proj"):
        raise ZeroDivisionError


def double(numbers: list[int]) -> list[int]:
    if any(number < 0 for number in numbers):
        raise HessianError("is negative")
    return [2 * number for number in numbers]


def test_of_linears_that_are_worked_on_at_once_the_one_at_fault_is_named():
    assert one_named(double, [1, 2, 3], str) == [2, 4, 6]
    with pytest.raises(ModelError, match=r"^-2: is negative$"):
        one_named(double, [1, -2, 3], str)


def test_an_error_of_the_linears_together_that_none_has_alone_is_not_swallowed():
    def together(numbers: list[int]) -> list[int]:
        if len(numbers) > 1:
            raise HessianError("is not theirs")
        return numbers

    with pytest.raises(HessianError, match=r"^is not theirs$"):
        one_named(together, [1, 2], str)
