"""The low-rank solver against a full SVD, and the properties that its optimum has.

Shapes: I in_features, O out_features, R rank, K = min(I, O).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lqer.lowrank.exact import singular_values
from lqer.lowrank.metric import Metric
from lqer.lowrank.solver import reconstruct

SHAPES = [(24, 40), (40, 24), (32, 32)]  # (out, in): both Gram matrices
each_shape = pytest.mark.parametrize("shape", SHAPES)


def error_and_scale(shape: tuple[int, int], decades: float = 2) -> tuple[Tensor, Tensor]:
    """A random error and positive scales that span `decades`, in no order."""
    generator = torch.Generator().manual_seed(0)
    scale_I = torch.logspace(-decades / 2, decades / 2, shape[1])
    return torch.randn(shape, generator=generator) * 0.01, scale_I[torch.randperm(shape[1], generator=generator)]


def product(factors) -> Tensor:
    return factors.a_IR.double() @ factors.b_RO.double()


def full_svd(error_OI: Tensor, scale_I: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(scale_I.double()[:, None] * error_OI.double().T, full_matrices=False)


@each_shape
@pytest.mark.parametrize("rank", [1, 5, 23])
def test_the_product_is_that_of_a_truncated_svd(shape, rank):
    error_OI, scale_I = error_and_scale(shape)
    u_IK, sigma_K, vt_KO = full_svd(error_OI, scale_I)
    expected_IO = (u_IK[:, :rank] * sigma_K[:rank]) @ vt_KO[:rank] / scale_I.double()[:, None]
    factors = reconstruct(error_OI, Metric(scale_I), rank)
    assert factors.a_IR.shape == (shape[1], rank)
    assert factors.b_RO.shape == (rank, shape[0])
    torch.testing.assert_close(product(factors), expected_IO, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(factors.singular_values, sigma_K, rtol=1e-9, atol=0.0)


@each_shape
def test_all_of_the_spectrum_is_in_b(shape):
    """A = S⁻¹ U with orthonormal U, B = Σ Vᵀ with orthonormal V, whichever Gram matrix was used."""
    error_OI, scale_I = error_and_scale(shape)
    factors = reconstruct(error_OI, Metric(scale_I), 6)
    u_IR = scale_I.double()[:, None] * factors.a_IR.double()
    torch.testing.assert_close(u_IR.T @ u_IR, torch.eye(6).double(), rtol=0.0, atol=1e-6)
    squares_R = factors.singular_values[:6].square()
    b_RO = factors.b_RO.double()
    torch.testing.assert_close(b_RO @ b_RO.T, squares_R.diag(), rtol=1e-6, atol=1e-7 * float(squares_R[0]))


@each_shape
def test_what_is_lost_is_the_tail_of_the_spectrum(shape):
    error_OI, scale_I = error_and_scale(shape)
    sigma_K = full_svd(error_OI, scale_I)[1]
    for rank in range(1, min(shape)):
        lost_IO = scale_I.double()[:, None] * (
            error_OI.double().T - product(reconstruct(error_OI, Metric(scale_I), rank))
        )
        torch.testing.assert_close(lost_IO.square().sum(), sigma_K[rank:].square().sum(), rtol=1e-6, atol=0.0)


@each_shape
@pytest.mark.parametrize("outlier", [False, True])
def test_scales_over_five_decades_cost_no_optimality(shape, outlier):
    error_OI, scale_I = error_and_scale(shape, decades=5)
    if outlier:
        scale_I = torch.where(scale_I == scale_I.max(), 1e5, 1.0)
    sigma_K = full_svd(error_OI, scale_I)[1]
    lost_IO = scale_I.double()[:, None] * (error_OI.double().T - product(reconstruct(error_OI, Metric(scale_I), 8)))
    assert float(lost_IO.norm() / sigma_K[8:].norm()) == pytest.approx(1, abs=1e-6)


@each_shape
def test_no_scale_is_a_scale_of_ones(shape):
    error_OI, _ = error_and_scale(shape)
    plain, ones = reconstruct(error_OI, Metric(), 7), reconstruct(error_OI, Metric(torch.ones(shape[1])), 7)
    assert torch.equal(plain.a_IR, ones.a_IR)
    assert torch.equal(plain.b_RO, ones.b_RO)


@each_shape
@pytest.mark.parametrize("constant", [1e-3, 7.0, 1e4])
def test_a_constant_factor_of_the_scale_does_not_change_the_product(shape, constant):
    error_OI, scale_I = error_and_scale(shape)
    expected_IO = product(reconstruct(error_OI, Metric(scale_I), 7))
    torch.testing.assert_close(
        product(reconstruct(error_OI, Metric(constant * scale_I), 7)), expected_IO, rtol=1e-5, atol=1e-8
    )


@each_shape
@pytest.mark.parametrize("beyond", [0, 100])
def test_full_rank_and_more_is_exact(shape, beyond):
    error_OI, scale_I = error_and_scale(shape)
    factors = reconstruct(error_OI, Metric(scale_I), min(shape) + beyond)
    assert factors.a_IR.shape[1] == min(shape)
    torch.testing.assert_close(product(factors), error_OI.double().T, rtol=1e-5, atol=1e-8)


@each_shape
def test_an_error_of_low_rank_is_recovered_at_that_rank_and_above(shape):
    generator = torch.Generator().manual_seed(1)
    error_OI = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1], generator=generator)
    scale_I = error_and_scale(shape)[1]
    for rank in (3, 10, min(shape)):
        factors = reconstruct(error_OI, Metric(scale_I), rank)
        torch.testing.assert_close(product(factors), error_OI.double().T, rtol=1e-5, atol=1e-5)
    two = product(reconstruct(error_OI, Metric(scale_I), 2))
    assert not torch.allclose(two, error_OI.double().T, rtol=1e-2, atol=1e-2)


@each_shape
def test_an_error_of_zero_gives_finite_factors_of_product_zero(shape):
    factors = reconstruct(torch.zeros(shape), Metric(torch.ones(shape[1])), 4)
    assert factors.a_IR.isfinite().all()
    assert factors.b_RO.isfinite().all()
    assert not product(factors).any()


@each_shape
def test_singular_values_are_those_of_the_scaled_error(shape):
    error_OI, scale_I = error_and_scale(shape)
    torch.testing.assert_close(
        singular_values(error_OI, Metric(scale_I)), full_svd(error_OI, scale_I)[1], rtol=1e-9, atol=0.0
    )
    torch.testing.assert_close(
        singular_values(error_OI, Metric()), torch.linalg.svdvals(error_OI.double()), rtol=1e-9, atol=0.0
    )
