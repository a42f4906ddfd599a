"""Drawn errors beside searched ones: how each is found, and what the tables say of them."""

from __future__ import annotations

import pytest
import torch
from compare_drawn_errors import BITS, WAYS, Found, _errors, by_bits, by_block, by_budget

from lqer.formats import Trellis
from lqer.methods import LinearPlan, RoundingOnly
from lqer.rounding import Ldlq
from lqer.rounding.hessian import damped_hessian
from lqer.rounding.trellis_law import drawn_errors
from lqer.stages.width_errors import Sampled
from lqer.statistics.site import SiteStatistics
from lqer.transforms import Hadamard


def found(name, block, searched, drawn, weights=100):
    losses = {"searched": torch.tensor(searched).double(), "drawn": torch.tensor(drawn).double()}
    squares = {way: losses_F.sqrt().tolist() for way, losses_F in losses.items()}
    return Found(name, block, weights, losses, squares, dict.fromkeys(WAYS, 0.0))


FOUND = [
    found("a", 0, [16.0, 4.0, 1.0, 0.25], [16.0, 4.0, 1.0, 0.25]),
    found("b", 3, [8.0, 2.0, 0.5, 0.125], [32.0, 8.0, 2.0, 0.5]),
]


def cells(lines):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines][1:]


def test_searched_errors_are_those_of_the_rounding_and_drawn_ones_those_of_the_law():
    generator = torch.Generator().manual_seed(0)
    x_TI, weight_OI = torch.randn(200, 32, generator=generator), torch.randn(32, 32, generator=generator)
    plan = LinearPlan(RoundingOnly(), Trellis(2), rounding=Ldlq(), transform=Hadamard())
    site = SiteStatistics({"hessian": x_TI.T @ x_TI / len(x_TI)})
    sampled = Sampled.of("l", plan, plan.method.target(weight_OI, site, plan), most=16)
    errors, _ = _errors(sampled, 12)
    damped = damped_hessian(sampled.statistics, Ldlq().damping)
    for i, bits in enumerate(BITS):
        rounded = Ldlq().round(sampled.weight_SI, sampled.statistics, Trellis(bits)).dequantize()
        assert torch.equal(errors["searched"][i], sampled.weight_SI - rounded)
        assert torch.equal(errors["drawn"][i], drawn_errors([sampled.weight_SI], [damped], Trellis(bits))[0])


def test_the_table_of_widths_has_the_spread_over_linears_and_the_ratio_of_their_sums():
    rows = cells(by_bits(FOUND))
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert {tuple(row[1:]) for row in rows} == {("2.50", "1.00", "4.00", "2.00")}


def test_the_table_of_blocks_has_the_extremes_of_a_block_alone():
    assert cells(by_block(FOUND)) == [["0", "1.000", "1.000"], ["3", "2.000", "2.000"]]


def test_the_table_of_budgets_counts_widths_that_differ_and_prices_them_by_the_search():
    # 3 bits for the two weights together: searched Δ gives the second bit to a, drawn Δ to b.
    row = next(row for row in cells(by_budget(FOUND)) if row[0] == "1.5")
    assert row[1] == "2 of 2"
    assert float(row[2]) == pytest.approx((16 + 2) / (4 + 8), abs=1e-4)
