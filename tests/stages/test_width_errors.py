"""Errors of a sample of rows: those of the plan's rounding, or of the law that they follow."""

from __future__ import annotations

import pytest
import torch

from lqer.formats import Int, Trellis
from lqer.methods import LinearPlan
from lqer.methods.base import RoundingOnly
from lqer.rounding import Gptq, Ldlq
from lqer.rounding.hessian import damped_hessian
from lqer.rounding.trellis_law import drawn_errors
from lqer.stages.width_errors import ROW_RUN, Sampled, errors_of, sampled_rows
from lqer.statistics.site import SiteStatistics
from lqer.transforms import Hadamard

COLUMNS = 32
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def site_of(plan: LinearPlan, sizes: dict[int, float], device: str) -> list[Sampled]:
    """Linears of so many outputs and such weights, on the same inputs."""
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(200, COLUMNS, generator=generator) * torch.linspace(0.2, 2, COLUMNS)
    statistics = SiteStatistics({"hessian": (x_TI.T @ x_TI / len(x_TI)).to(device)})
    weights = [size * torch.randn(rows, COLUMNS, generator=generator).to(device) for rows, size in sizes.items()]
    return [Sampled.of(f"l{i}", plan, plan.method.target(w, statistics, plan)) for i, w in enumerate(weights)]


def alone(site: list[Sampled], formats: list) -> list[list[torch.Tensor]]:
    return [
        [
            one.weight_SI - one.plan.rounding.round(one.weight_SI, one.statistics, number_format).dequantize()
            for number_format in formats
        ]
        for one in site
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_trellis_codes_of_rotated_weights_are_not_searched(device, monkeypatch):
    plan = LinearPlan(RoundingOnly(), Trellis(2), rounding=Ldlq(damping=0.1), transform=Hadamard())
    site = site_of(plan, {32: 1.0, 16: 50.0}, device)
    assert site[0].statistics is site[1].statistics
    expected = [one.weight_SI - Int(4, 16).quantize(one.weight_SI).dequantize() for one in site]
    monkeypatch.setattr(Ldlq, "round_together", lambda _, weights, *rest: [Int(4, 16).quantize(w) for w in weights])
    for one, (drawn, rounded), error in zip(site, errors_of(site, [Trellis(2), Int(4, 16)]), expected, strict=True):
        (law,) = drawn_errors([one.weight_SI], [damped_hessian(one.statistics, 0.1)], Trellis(2))
        assert torch.equal(drawn, law)
        assert torch.equal(rounded, error)


@pytest.mark.parametrize(
    "plan",
    [
        LinearPlan(RoundingOnly(), Trellis(2), rounding=Ldlq()),
        LinearPlan(RoundingOnly(), Trellis(2), rounding=Ldlq(tune_iters=1), transform=Hadamard()),
    ],
    ids=["plain", "tuned"],
)
def test_trellis_codes_without_a_law_are_searched(plan):
    site = site_of(plan, {16: 1.0, 32: 3.0}, "cpu")
    formats = [Trellis(2)]
    for found, expected in zip(errors_of(site, formats), alone(site, formats), strict=True):
        assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("device", DEVICES)
def test_other_formats_are_rounded_linear_by_linear(device):
    plan = LinearPlan(RoundingOnly(), Int(4, 16), rounding=Gptq())
    site = site_of(plan, {20: 1.0, 7: 3.0}, device)
    formats = [Int(2, 16), Int(4, 16)]
    for found, expected in zip(errors_of(site, formats), alone(site, formats), strict=True):
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("device", DEVICES)
def test_linears_alike_under_their_own_statistics_are_rounded_as_each_alone(device):
    plan = LinearPlan(RoundingOnly(), Trellis(2), rounding=Ldlq())
    batch = [site_of(plan, {32: size}, device)[0] for size in (1.0, 3.0)]
    assert batch[0].statistics is not batch[1].statistics
    formats = [Trellis(2), Int(4, 16)]
    for found, expected in zip(errors_of(batch, formats), alone(batch, formats), strict=True):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.square().sum(), other.square().sum(), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("out_features", [5, 512, 513, 1536, 8960])
def test_sampled_rows_are_whole_runs_of_the_weight(out_features):
    rows = sampled_rows(out_features)
    assert len(rows) == min(out_features, 512)
    assert rows.unique().equal(rows)
    assert rows.max() < out_features
    if out_features > 512:
        runs = rows.view(-1, ROW_RUN)
        assert (runs[:, 0] % ROW_RUN == 0).all()
        assert (runs - runs[:, :1] == torch.arange(ROW_RUN)).all()
