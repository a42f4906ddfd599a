"""LPLR: least squares in turns, against plain least squares in float64 and against the optimum without rounding.

Shapes: I in_features, O out_features, R rank.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from lqer.formats import E8P, MXInt, Passthrough, QuantizedTensor
from lqer.lowrank.lplr import lplr
from lqer.lowrank.metric import Metric
from lqer.lowrank.solver import reconstruct
from lqer.rounding.hessian import damp
from lqer.rounding.ldlq import ldlq

IN, OUT, RANK = 64, 48, 8


@pytest.fixture(params=range(3))
def problem(request) -> tuple[Tensor, Metric]:
    generator = torch.Generator().manual_seed(request.param)
    target_OI = torch.randn(OUT, IN, generator=generator) @ torch.randn(IN, IN, generator=generator).mul(0.3)
    x_TI = torch.randn(400, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)
    return target_OI, Metric(hessian_II=damp(x_TI.T @ x_TI).hessian_II.float())


def run(problem, number_format, iterations: int = 5, feedback=None):
    target_OI, metric = problem
    start_IR = reconstruct(target_OI, metric, RANK).a_IR
    along_i, along_o = (partial(number_format.quantize, axis=axis) for axis in (0, 1))
    return lplr(target_OI, metric, start_IR, along_i, along_o, iterations, feedback)


def error(problem, pair) -> float:
    target_OI, metric = problem
    left_OI = target_OI.double() - (pair.a_IR.dequantize().double() @ pair.b_RO.dequantize().double()).T
    return float((left_OI @ metric.hessian_II.double() * left_OI).sum())


@pytest.mark.parametrize("number_format", [E8P(4), E8P(2), MXInt(4)])
def test_it_reports_the_error_of_what_it_returns(problem, number_format):
    pair = run(problem, number_format)
    assert pair.energy == pytest.approx(error(problem, pair), rel=1e-4)


def test_what_is_not_rounded_stays_the_optimum(problem):
    target_OI, metric = problem
    optimum = reconstruct(target_OI, metric, RANK)
    assert error(problem, run(problem, Passthrough("float32"))) == pytest.approx(
        optimum.energy - float(optimum.singular_values[:RANK].square().sum()), rel=1e-5
    )


def test_further_turns_never_return_a_worse_pair(problem):
    energies = [run(problem, E8P(2), iterations).energy for iterations in (1, 2, 4, 8)]
    assert energies == sorted(energies, reverse=True)
    assert energies[-1] < energies[0]


def test_a_turn_is_least_squares_for_b_then_for_a(problem):
    target_OI, metric = problem
    eigenvalues_I, vectors_II = torch.linalg.eigh(metric.hessian_II.double())
    root_II = vectors_II * eigenvalues_I.sqrt() @ vectors_II.T
    start_IR = MXInt(4).quantize(reconstruct(target_OI, metric, RANK).a_IR, axis=0).dequantize()
    halves = Passthrough("float32").quantize
    pair = lplr(target_OI, metric, start_IR, halves, halves, 1)
    b_RO = torch.linalg.lstsq(root_II @ start_IR.double(), root_II @ target_OI.T.double()).solution
    a_IR = torch.linalg.lstsq(b_RO.T, target_OI.double()).solution.T
    torch.testing.assert_close(pair.b_RO.dequantize().double(), b_RO, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(pair.a_IR.dequantize().double(), a_IR, rtol=1e-3, atol=1e-4)


def test_error_feedback_on_the_last_a_is_kept_where_it_is_better(problem):
    damped = damp(problem[1].hessian_II, 0.0)

    def feed_back(a_IR: Tensor) -> QuantizedTensor:
        rounded = ldlq(a_IR.T.contiguous(), damped, E8P(2))
        return QuantizedTensor(E8P(2), tuple(a_IR.shape), 0, rounded.parts)

    without, with_feedback = run(problem, E8P(2)), run(problem, E8P(2), feedback=feed_back)
    unrounded = run(problem, Passthrough("float32")).energy
    assert with_feedback.energy - unrounded < 0.97 * (without.energy - unrounded)
    assert with_feedback.energy == pytest.approx(error(problem, with_feedback), rel=1e-4)
    spoilt = run(problem, E8P(2), feedback=lambda a_IR: E8P(2).quantize(torch.zeros_like(a_IR), axis=0))
    assert spoilt.energy == without.energy


def test_columns_that_say_the_same_are_no_obstacle():
    start_IR = torch.ones(IN, 4)
    target_OI = torch.ones(OUT, IN)
    pair = lplr(target_OI, Metric(), start_IR, Passthrough().quantize, Passthrough().quantize, 2)
    product_OI = (pair.a_IR.dequantize() @ pair.b_RO.dequantize()).T
    torch.testing.assert_close(product_OI, target_OI, rtol=1e-3, atol=1e-3)
    nothing = lplr(torch.zeros(OUT, IN), Metric(), torch.zeros(IN, 4), E8P(2).quantize, E8P(2).quantize, 2)
    assert nothing.energy == 0
    assert (nothing.a_IR.dequantize() @ nothing.b_RO.dequantize()).abs().max() == 0
