"""The factor of the inverse Hessian, and the feedback made of it."""

import pytest
import torch

from lqer.rounding.factor import block_feedback, inverse_factor


def hessian(size=12, seed=0):
    x_TI = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x_TI[:, 1:] += x_TI[:, :-1]
    return x_TI.T @ x_TI


def test_it_is_an_upper_factor_of_the_damped_inverse():
    hessian_II = hessian()
    factor_II = inverse_factor(hessian_II, 0.05)
    damped_II = hessian_II / hessian_II.diagonal().mean() + 0.05 * torch.eye(12, dtype=torch.float64)
    assert torch.equal(factor_II, factor_II.triu())
    torch.testing.assert_close(factor_II.T @ factor_II, torch.linalg.inv(damped_II))


def test_damping_is_raised_until_a_singular_hessian_can_be_factored():
    x_TI = torch.randn(3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hessian_II = x_TI.T @ x_TI - 1e-5 * torch.eye(12, dtype=torch.float64)
    factor_II = inverse_factor(hessian_II, 1e-8)
    assert factor_II.isfinite().all()
    unit_II = hessian_II / hessian_II.diagonal().mean()
    added_II = torch.linalg.inv(factor_II.T @ factor_II) - unit_II
    ratio = float(added_II.diagonal().mean()) / 1e-8
    assert ratio == pytest.approx(10 ** round(torch.tensor(ratio).log10().item()), rel=1e-3)
    assert ratio > 5


def test_zeros_stand_for_the_identity():
    factor_II = inverse_factor(torch.zeros(5, 5), 0.0)
    assert torch.equal(factor_II, torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("dimension", [1, 2, 4])
def test_feedback_is_the_best_answer_of_the_columns_behind_to_an_error_in_a_block(dimension):
    # For an error e in block P the columns r behind it minimise (e, d) H (e, d)^T: d = -e H_Pr H_rr^-1.
    hessian_II = hessian() / hessian().diagonal().mean()
    feedback_II = block_feedback(inverse_factor(hessian_II, 0.0), dimension)
    for start in range(0, 12 - dimension, dimension):
        block, behind = slice(start, start + dimension), slice(start + dimension, 12)
        best_DI = -hessian_II[block, behind] @ torch.linalg.inv(hessian_II[behind, behind])
        torch.testing.assert_close(feedback_II[block, behind], best_DI, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(feedback_II[block, block], torch.eye(dimension, dtype=torch.float64))


def test_what_cannot_be_a_hessian_is_refused():
    with pytest.raises(ValueError, match="the Hessian holds NaN or infinity"):
        inverse_factor(torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match="not positive definite with a damping of 1000"):
        inverse_factor(torch.tensor([[1.0, 1e5], [1e5, 1.0]]), 0.001)
