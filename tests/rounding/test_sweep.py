"""GPTQ's columns in one kernel; without a GPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from lqer.formats import MX, Int, MXInt, NormalFloat
from lqer.formats.spacing import Spacing
from lqer.rounding import gptq as gptq_module
from lqer.rounding.descent import _panel_column_by_column as descend_column_by_column
from lqer.rounding.hessian import damp
from lqer.rounding.sweep import descend_panel, sweep_panel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = {way: getattr(gptq_module, way) for way in ("_panel_in_one_kernel", "_panel_column_by_column")}
NUMBER_FORMATS = [
    Int(bits=3, block_size=32), Int(bits=4, block_size="row"), MXInt(bits=4), MXInt(bits=3, levels="mid-rise"),
    MX("mxfp4_e2m1"), MX("mxfp6_e3m2", element_rounding="away"), NormalFloat(4, 64), NormalFloat(5, "row", "cdf"),
]  # fmt: skip
CASES = [(128, 40, 3, False), (32, 33, 4, True), (48, 8, 2, False), (1, 5, 8, False)]


def swept_by_hand(weight_PO, upper_PP, step_PO, zero_PO, min_code, max_code):
    """The module's equations in PyTorch, column by column."""
    weight_PO = weight_PO.clone()
    codes_PO, error_PO = torch.empty_like(weight_PO), torch.empty_like(weight_PO)
    for i in range(len(weight_PO)):
        codes_PO[i] = ((weight_PO[i] / step_PO[i]).round() + zero_PO[i]).clamp(min_code, max_code)
        error_PO[i] = (weight_PO[i] - (codes_PO[i] - zero_PO[i]) * step_PO[i]) / upper_PP[i, i]
        weight_PO[i + 1 :] -= torch.outer(upper_PP[i, i + 1 :], error_PO[i])
    return codes_PO, error_PO


@pytest.mark.parametrize(("columns", "rows", "bits", "symmetric"), CASES)
def test_the_kernel_walks_the_columns_as_the_equations_say(columns, rows, bits, symmetric):
    generator = torch.Generator().manual_seed(columns)
    weight_PO = torch.randn(columns, rows, generator=generator).to(DEVICE)
    upper_PP = torch.randn(columns, columns, generator=generator).triu(1).mul(0.1).to(DEVICE)
    upper_PP += torch.rand(columns, generator=generator).add(0.5).diag().to(DEVICE)
    step_PO = torch.rand(rows, generator=generator).add(0.1).to(DEVICE).expand(columns, rows)
    zero_O = torch.zeros(rows) if symmetric else torch.randint(0, 1 << bits, (rows,), generator=generator).float()
    zero_PO = zero_O.to(DEVICE).expand(columns, rows)
    low = -(1 << (bits - 1)) if symmetric else 0
    limits = low, low + (1 << bits) - 1
    codes_PO, error_PO = sweep_panel(weight_PO[:, None], upper_PP[None], Spacing(step_PO, zero_PO, *limits))
    expected_codes_PO, expected_error_PO = swept_by_hand(weight_PO, upper_PP, step_PO, zero_PO, *limits)
    # The sums differ in the last bit, so a weight halfway between two codes may go either way.
    assert (codes_PO != expected_codes_PO).float().mean() <= 2e-3
    same_O = (codes_PO == expected_codes_PO).all(0)
    torch.testing.assert_close(error_PO[:, same_O], expected_error_PO[:, same_O], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number_format", NUMBER_FORMATS)
@pytest.mark.parametrize("activation_order", [False, True])
def test_gptq_in_the_kernel_is_gptq_column_by_column(monkeypatch, number_format, activation_order):
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(40, 200, generator=generator).to(DEVICE)
    x_TI = torch.randn(500, 200, generator=generator) @ torch.randn(200, 200, generator=generator)
    hessian_II = (x_TI.T @ x_TI / 500).to(DEVICE)
    options = {"activation_order": activation_order, "static_groups": activation_order}
    found = {}
    for way in ("_panel_in_one_kernel", "_panel_column_by_column"):
        for replaced in ("_panel_in_one_kernel", "_panel_column_by_column"):
            monkeypatch.setattr(gptq_module, replaced, WAYS[way])
        found[way] = gptq_module.gptq(weight_OI, damp(hessian_II), number_format, **options).dequantize()
    a_OI, b_OI = found.values()
    losses = [((weight_OI - q_OI) @ hessian_II * (weight_OI - q_OI)).sum() for q_OI in (a_OI, b_OI)]
    assert (a_OI != b_OI).float().mean() < 0.02
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)


@pytest.mark.parametrize(("columns", "rows", "bits", "symmetric"), CASES)
def test_a_sweep_of_descent_in_the_kernel_is_one_column_by_column(columns, rows, bits, symmetric):
    generator = torch.Generator().manual_seed(columns)
    x_TP = torch.randn(2 * columns, columns, generator=generator)
    hessian_PP = (x_TP.T @ x_TP / len(x_TP)).to(DEVICE)
    step_PO = torch.rand(columns, rows, generator=generator).add(0.1).to(DEVICE)
    step_PO[:, 1] = 0
    low = -(1 << (bits - 1)) if symmetric else 0
    limits = low, low + (1 << bits) - 1
    codes_PO = torch.randint(low, limits[1] + 1, (columns, rows), generator=generator).float().to(DEVICE)
    error_PO = torch.randn(columns, rows, generator=generator).to(DEVICE) * step_PO
    found, expected = ([x.clone() for x in (codes_PO, error_PO, hessian_PP @ error_PO)] for _ in range(2))
    descend_panel(*found, hessian_PP, step_PO, limits)
    descend_column_by_column(*expected, hessian_PP, step_PO, limits)
    assert (found[0] != expected[0]).float().mean() <= 2e-3
    same_O = (found[0] == expected[0]).all(0)
    torch.testing.assert_close(found[1][:, same_O], expected[1][:, same_O], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[0][:, 1], codes_PO[:, 1])
    assert (found[0] != codes_PO).any()
