"""Spaces that are recorded on a GPU are those that are grown launch by launch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lqer.lowrank import krylov_graphs
from lqer.lowrank.krylov import solve_krylov
from lqer.lowrank.krylov_graphs import growing_space, recorded_growth
from lqer.lowrank.metric import Metric

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
OUT, IN, RANK = 480, 640, 8


def problem(seed: int, kind: str, device: str = "cuda") -> tuple[Tensor, Metric]:
    generator = torch.Generator().manual_seed(seed)
    error_OI = torch.randn(OUT, IN, generator=generator) * torch.rand(IN, generator=generator) ** (1 + seed)
    x_TI = torch.randn(2 * IN, IN, generator=generator)
    scale_I, hessian_II = x_TI.square().mean(0).sqrt().to(device), (x_TI.T @ x_TI / len(x_TI)).to(device)
    metric = {"none": Metric(), "scale": Metric(scale_I=scale_I), "hessian": Metric(hessian_II=hessian_II)}[kind]
    return error_OI.to(device), metric


def recorded() -> dict[object, object]:
    found = krylov_graphs._recordings.get()
    assert found is not None
    return {kind: recording for kind, recording in found.items() if recording is not None}


@needs_gpu
@pytest.mark.parametrize("kind", ["none", "scale", "hessian"])
def test_errors_of_one_shape_have_the_products_that_they_have_unrecorded(kind):
    problems = [problem(seed, kind) for seed in range(5)]
    alone = [solve_krylov(error_OI, metric, RANK, 0) for error_OI, metric in problems]
    with recorded_growth():
        beside = [solve_krylov(error_OI, metric, RANK, 0) for error_OI, metric in problems]
        assert len(recorded()) == 1
    for one, other in zip(alone, beside, strict=True):
        product_IO = one.a_IR @ one.b_RO
        torch.testing.assert_close(other.a_IR @ other.b_RO, product_IO, rtol=1e-4, atol=1e-5)
        assert other.gap == pytest.approx(one.gap, rel=1e-3, abs=1e-9)
    for one, other in pairwise(beside):
        assert not torch.allclose(one.b_RO, other.b_RO)


@needs_gpu
def test_a_space_may_grow_further_than_any_before_it():
    (error_OI, metric), (other_OI, _) = problem(0, "scale"), problem(4, "scale")
    expected = growing_space(error_OI, metric, 24, 240, 0)
    rows = [row_LD.clone() for row_LD in expected.rows]
    with recorded_growth():
        for taken in (2, 2, 4):
            space = growing_space(other_OI, metric, 24, 240, 0)
            for _ in range(taken):
                next(space.rows)
        space = growing_space(error_OI, metric, 24, 240, 0)
        for row_LD, expected_LD in zip(space.rows, rows, strict=True):
            torch.testing.assert_close(row_LD, expected_LD, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(space.basis_DO, expected.basis_DO, rtol=1e-5, atol=1e-6)


@needs_gpu
def test_no_more_kinds_of_errors_are_recorded_than_may_be_and_none_outside_the_context(monkeypatch):
    monkeypatch.setattr(krylov_graphs, "MOST_RECORDINGS", 1)
    (error_OI, metric), (other_OI, other) = problem(0, "none"), problem(0, "scale")
    with recorded_growth():
        for _ in range(3):
            solve_krylov(error_OI, metric, RANK, 0)
            with recorded_growth():
                solve_krylov(other_OI, other, RANK, 0)
        assert len(recorded()) == 1
    assert krylov_graphs._recordings.get() is None


@needs_gpu
def test_large_errors_are_grown_launch_by_launch(monkeypatch):
    error_OI, metric = problem(0, "hessian")
    monkeypatch.setattr(krylov_graphs, "LARGEST_RECORDED", error_OI.nbytes)
    with recorded_growth():
        for _ in range(3):
            solve_krylov(error_OI, metric, RANK, 0)
        assert not recorded()


def test_nothing_is_recorded_on_a_cpu():
    error_OI, metric = problem(0, "scale", "cpu")
    alone = solve_krylov(error_OI, metric, RANK, 0)
    with recorded_growth():
        beside = [solve_krylov(error_OI, metric, RANK, 0) for _ in range(3)]
        assert not recorded()
    assert all(torch.equal(alone.b_RO, other.b_RO) for other in beside)
