"""Normalising, damping and its raises, refusals."""

import pytest
import torch

from lqer.formats import NonFiniteError
from lqer.rounding.hessian import damp, damped_hessian, down_date


def test_the_mean_diagonal_becomes_one_and_damping_is_added(make_layer):
    hessian_II = make_layer(8, 24)[1]
    damped = damp(hessian_II, 0.05)
    expected_II = hessian_II / hessian_II.diagonal().mean() + 0.05 * torch.eye(24)
    torch.testing.assert_close(damped.hessian_II, expected_II)
    torch.testing.assert_close(damped.cholesky_II @ damped.cholesky_II.T, expected_II)
    assert (damped.raises, damped.damping) == (0, 0.05)


def test_the_scale_of_the_hessian_does_not_matter(make_layer):
    hessian_II = make_layer(8, 24)[1]
    torch.testing.assert_close(
        damp(1e-6 * hessian_II).hessian_II, damp(hessian_II.float()).hessian_II, rtol=1e-5, atol=1e-6
    )


def test_a_failed_factorization_raises_damping_tenfold_and_counts():
    hessian_II = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0]))
    hessian_II[0, 1] = hessian_II[1, 0] = 1.5  # smallest eigenvalue -0.5
    damped = damp(hessian_II, 0.01)
    assert (damped.raises, damped.damping) == (2, 1.0)
    assert damp(torch.ones(4, 4) - 1e-9 * torch.eye(4), 0.0).raises > 0


def test_inputs_that_were_never_seen_are_told_and_get_a_diagonal(make_layer):
    hessian_II = make_layer(8, 24)[1]
    hessian_II[3] = hessian_II[:, 3] = 0
    damped = damp(hessian_II)
    assert damped.dead_I.nonzero().tolist() == [[3]]
    assert float(damped.hessian_II[3, 3]) == pytest.approx(1.01)
    alive = torch.arange(24) != 3
    assert float(damped.hessian_II.diagonal()[alive].mean()) == pytest.approx(1.01)
    assert damp(torch.zeros(4, 4)).raises == 0


def test_a_damped_hessian_is_taken_as_it_is(make_layer):
    damped = damp(make_layer(8, 24)[1])
    assert damped_hessian({"hessian": damped}, 0.5) is damped


def test_what_is_no_second_moment_is_refused():
    with pytest.raises(ValueError, match=r"a hessian is square, found shape \(3, 4\)"):
        damp(torch.ones(3, 4))
    with pytest.raises(NonFiniteError, match="the hessian holds 1 values that are not finite"):
        damp(torch.diag(torch.tensor([1.0, torch.nan])).nan_to_num(0.0) + torch.tensor([[torch.inf, 0], [0, 1.0]]))
    with pytest.raises(ValueError, match="negative diagonal entry -2"):
        damp(torch.diag(torch.tensor([1.0, -2.0])))
    with pytest.raises(ValueError, match=r"damping -0\.1 is negative"):
        damp(torch.eye(2), -0.1)
    with pytest.raises(ValueError, match=r"not positive definite with 1e\+06 of its mean diagonal"):
        damp(torch.tensor([[1.0, 1e9], [1e9, 1.0]]))


def test_a_down_date_frees_what_the_branch_can_mend_and_nothing_else(make_layer):
    """H' from its definition: the right singular vectors of L R M, M Mᵀ = H, are taken out."""
    damped = damp(make_layer(8, 24)[1], 0.01)
    generator = torch.Generator().manual_seed(0)
    a_IR, b_RO = torch.randn(24, 4, generator=generator), torch.randn(4, 8, generator=generator)
    right_RI = torch.linalg.svd((a_IR @ b_RO).T.double() @ damped.cholesky_II)[2][:4]
    taken_IR = damped.cholesky_II @ right_RI.T
    for fraction in (1.0, 0.75):
        expected_II = damp(damped.hessian_II - fraction * taken_IR @ taken_IR.T, 0.01).hessian_II
        torch.testing.assert_close(down_date(damped, a_IR, fraction).hessian_II, expected_II, rtol=1e-6, atol=1e-7)
    free = down_date(damped, a_IR).hessian_II - 0.01 * torch.eye(24)
    torch.testing.assert_close(a_IR.T.double() @ free @ a_IR.double(), torch.zeros(4, 4).double(), rtol=0.0, atol=1e-6)


def test_a_down_date_by_all_there_is_or_by_nothing_is_a_hessian(make_layer):
    damped = damp(make_layer(8, 24)[1], 0.01)
    for a_IR in (torch.eye(24), torch.zeros(24, 4)):
        left = down_date(damped, a_IR)
        assert left.cholesky_II.isfinite().all()
        assert torch.equal(left.dead_I, damped.dead_I)
