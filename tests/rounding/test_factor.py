"""The factor of the inverse Hessian, and the feedback made of it."""

import pytest
import torch

from lqer.rounding.factor import inverse_factor, vector_feedback
from lqer.rounding.hessian import damp


def hessian(size=12, seed=0):
    x_TI = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x_TI[:, 1:] += x_TI[:, :-1]
    return x_TI.T @ x_TI


@pytest.mark.parametrize("order_I", [None, torch.randperm(12, generator=torch.Generator().manual_seed(1))])
def test_it_is_an_upper_factor_of_the_inverse_in_any_order(order_I):
    damped = damp(hessian(), 0.05)
    factor_II = inverse_factor(damped, order_I)
    assert torch.equal(factor_II, factor_II.triu())
    expected_II = torch.linalg.inv(damped.hessian_II)
    if order_I is not None:
        expected_II = expected_II[order_I][:, order_I]
    torch.testing.assert_close(factor_II.T @ factor_II, expected_II)


def test_zeros_stand_for_the_identity():
    assert torch.equal(inverse_factor(damp(torch.zeros(5, 5), 0.0)), torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("dimension", [1, 2, 4])
def test_feedback_is_the_best_answer_of_the_columns_behind_to_an_error_in_a_block(dimension):
    # For an error e in block P the columns r behind it minimise (e, d) H (e, d)^T: d = -e H_Pr H_rr^-1.
    hessian_II = hessian() / hessian().diagonal().mean()
    damped = damp(hessian_II, 0.0)
    feedback_II, diagonal_I = vector_feedback(damped, dimension)
    assert torch.equal(diagonal_I, inverse_factor(damped).diagonal())
    for start in range(0, 12 - dimension, dimension):
        block, behind = slice(start, start + dimension), slice(start + dimension, 12)
        best_DI = -hessian_II[block, behind] @ torch.linalg.inv(hessian_II[behind, behind])
        # The same numbers to float32: they are computed in float64.
        torch.testing.assert_close(feedback_II[block, behind], best_DI.float(), rtol=2e-7, atol=1e-8)
        torch.testing.assert_close(feedback_II[block, block], torch.eye(dimension))
