"""The codebook update: adjoint, monotone, as good as least squares, refused where rounding undoes it."""

import pytest
import torch
from vq_layers import loss, round_vector, student_layer

from lqer.formats import Codebook
from lqer.rounding import codebook_update
from lqer.rounding.codebook_update import (
    LayerLoss,
    adam,
    basis_problem,
    centroid_problem,
    conjugate_gradients,
    factor_problem,
    update_codebooks,
)

FORMATS = [
    Codebook(2, 1, 256),
    Codebook(2, 2, 2048),
    Codebook(2, 4, 16384),
    Codebook(2, 2, 2048, scale_block_size=32),
    Codebook(2, 1, 128, codebook_rank=2),
]
each_format = pytest.mark.parametrize("number_format", FORMATS, ids=str)
each_update = pytest.mark.parametrize("update", ["cg", "adam"])


def swept(number_format, shape=(40, 288), seed=0):
    weight_OI, hessian_II = student_layer(*shape, seed)
    return weight_OI, hessian_II, round_vector(weight_OI, hessian_II, number_format, update="none")


@each_format
@each_update
@pytest.mark.parametrize("shape", [(40, 288), (23, 172)])
def test_the_update_never_raises_the_loss(number_format, update, shape):
    weight_OI, hessian_II, before = swept(number_format, shape)
    after = update_codebooks(weight_OI, hessian_II, before, update)
    assert loss(weight_OI, hessian_II, after.dequantize()) <= loss(weight_OI, hessian_II, before.dequantize())
    # Again: little is left, and what rounding to int8 would undo is refused.
    last = update_codebooks(weight_OI, hessian_II, after, update)
    assert loss(weight_OI, hessian_II, last.dequantize()) <= loss(weight_OI, hessian_II, after.dequantize())


@each_format
def test_the_closed_form_lowers_the_loss_of_a_fresh_sweep(number_format):
    weight_OI, hessian_II, before = swept(number_format)
    after = update_codebooks(weight_OI, hessian_II, before)
    assert loss(weight_OI, hessian_II, after.dequantize()) < 0.995 * loss(weight_OI, hessian_II, before.dequantize())
    kept = [name for name in before.parts if not name.startswith("codebook")]
    assert all(torch.equal(before.parts[name], after.parts[name]) for name in kept)
    assert {name: part.shape for name, part in after.parts.items()} == {n: p.shape for n, p in before.parts.items()}


@each_format
def test_the_two_directions_between_centroids_and_weights_are_adjoint(number_format):
    weight_OI, hessian_II, quantized = swept(number_format, (23, 172))
    layer = LayerLoss(weight_OI, hessian_II, quantized)
    centroids_GCKD = number_format.decode_centroids(quantized.parts)
    torch.testing.assert_close(layer.weights(centroids_GCKD), quantized.dequantize())
    c = torch.randn(centroids_GCKD.shape, generator=torch.Generator().manual_seed(0))
    x = torch.randn(weight_OI.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close((layer.weights(c) * x).sum(), (c * layer.sums(x)).sum(), rtol=1e-4, atol=1e-4)


def problems(number_format):
    weight_OI, hessian_II, quantized = swept(number_format)
    layer = LayerLoss(weight_OI, hessian_II, quantized)
    if not number_format.codebook_rank:
        return [(centroid_problem(layer), number_format.decode_centroids(quantized.parts))]
    basis_rK = quantized.parts["codebook_basis"]
    factors_GCr = quantized.parts["codebooks"].float() * quantized.parts["codebook_scales"].float().unsqueeze(-1)
    return [(factor_problem(layer, basis_rK), factors_GCr), (basis_problem(layer, factors_GCr), basis_rK.unsqueeze(0))]


@each_format
def test_the_descent_is_minus_half_the_gradient(number_format):
    for problem, theta_T in problems(number_format):
        theta_T = theta_T.clone().requires_grad_()
        layer = problem.loss
        error_OI = layer.weight_OI - layer.weights(problem.expand(theta_T))
        (error_OI @ layer.hessian_II * error_OI).sum().backward()
        scale = theta_T.grad.abs().max()
        torch.testing.assert_close(
            problem.descent(theta_T.detach()) / scale, -theta_T.grad / 2 / scale, rtol=1e-3, atol=1e-4
        )


@each_format
def test_more_conjugate_gradients_never_raise_the_loss(number_format):
    for problem, theta_T in problems(number_format):
        last_G = problem.loss.value(problem.expand(theta_T)).sum()
        for iterations in (1, 2, 4, 8, 16):
            now_G = problem.loss.value(problem.expand(conjugate_gradients(problem, theta_T, iterations))).sum()
            assert now_G <= last_G * (1 + 1e-6)
            last_G = now_G


def test_conjugate_gradients_reach_the_least_squares_solution():
    number_format = Codebook(2, 2, 256, 32)
    weight_OI, hessian_II, quantized = swept(number_format, (16, 64))
    layer = LayerLoss(weight_OI, hessian_II, quantized)
    problem, start = centroid_problem(layer), number_format.decode_centroids(quantized.parts)
    # The design matrix column by column, weighted by a factor of H: an ordinary least-squares problem.
    root_II = torch.linalg.cholesky(layer.hessian_II.double())
    columns = [(layer.weights(unit.view_as(start)).double() @ root_II).flatten() for unit in torch.eye(start.numel())]
    target = (weight_OI.double() @ root_II).flatten()
    design = torch.stack(columns, dim=1)
    best = torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution
    floor = float((design @ best - target[:, None]).square().sum())
    reached = float(layer.value(conjugate_gradients(problem, start, 200)).sum())
    assert reached == pytest.approx(floor, rel=1e-4)
    assert float(layer.value(conjugate_gradients(problem, start)).sum()) < 1.01 * floor


def test_adam_starts_again_with_a_smaller_rate_and_gives_up_in_the_end(monkeypatch):
    (problem, theta_T), *_ = problems(Codebook(2, 2, 2048))
    before = problem.loss.value(theta_T).sum()
    monkeypatch.setattr(codebook_update, "ADAM_RATE", 1.0)
    moved_T = adam(problem, theta_T)
    assert problem.loss.value(moved_T).sum() < before
    assert (moved_T - theta_T).abs().max() < 0.1
    monkeypatch.setattr(codebook_update, "ADAM_RATE", 1e9)
    assert torch.equal(adam(problem, theta_T), theta_T)


def test_a_proposal_that_is_worse_is_refused_group_of_rows_by_group(monkeypatch):
    weight_OI, hessian_II, before = swept(Codebook(2, 2, 2048))

    def spoil(problem, theta_T):
        better = conjugate_gradients(problem, theta_T)
        better[::2] *= 3
        return better

    monkeypatch.setattr(codebook_update, "conjugate_gradients", spoil)
    after = update_codebooks(weight_OI, hessian_II, before)
    for name in ("codebooks", "codebook_scales"):
        assert torch.equal(after.parts[name][::2], before.parts[name][::2])
        assert not torch.equal(after.parts[name][1::2], before.parts[name][1::2])


def test_none_leaves_the_codebooks_alone():
    weight_OI, hessian_II, before = swept(Codebook(2, 2, 2048))
    assert update_codebooks(weight_OI, hessian_II, before, "none") is before
