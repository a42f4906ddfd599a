"""Refitted scales and coordinate descent: what they may never raise, and optima found independently.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from lqer.formats import Int, MXInt, NormalFloat
from lqer.rounding import Gptq, descent
from lqer.rounding.descent import descend, refit, row_losses, sweep
from lqer.rounding.gptq import gptq
from lqer.rounding.hessian import damp

FORMATS = [
    Int(2, 32),
    Int(3, 64, symmetric=True),
    Int(3, "row", scale_dtype="bfloat16"),
    Int(4, 48),
    Int(3, "tensor"),
    MXInt(3, 32),
    MXInt(2, 16, levels="mid-rise"),
]
each_format = pytest.mark.parametrize("number_format", FORMATS, ids=lambda f: "-".join(map(str, f.to_dict().values())))


@pytest.fixture(scope="module")
def layer(make_layer):
    weight_OI, hessian_II = make_layer(24, 160)
    return weight_OI, damp(hessian_II).hessian_II


@each_format
@pytest.mark.parametrize("start", ["gptq", "nearest"])
def test_no_row_ever_loses(number_format, start, layer):
    weight_OI, hessian_II = layer
    first = gptq(weight_OI, damp(hessian_II), number_format) if start == "gptq" else number_format.quantize(weight_OI)
    losses = [row_losses(weight_OI, hessian_II, descend(weight_OI, hessian_II, first, turns)) for turns in range(4)]
    for earlier_O, later_O in itertools.pairwise(losses):
        assert (later_O <= earlier_O).all()
    assert losses[-1].sum() < 0.97 * losses[0].sum()


@each_format
def test_the_result_is_what_the_format_can_store(number_format, layer):
    weight_OI, hessian_II = layer
    found = descend(weight_OI, hessian_II, number_format.quantize(weight_OI), 2)
    restored = number_format.unpack(found.pack(), weight_OI.shape, 1)
    assert torch.equal(restored.dequantize(), found.dequantize())
    assert {name: (part.dtype, part.shape) for name, part in found.parts.items()} == {
        name: (part.dtype, part.shape) for name, part in number_format.quantize(weight_OI).parts.items()
    }


def test_refitted_scales_are_those_of_least_squares(layer):
    weight_OI, hessian_II = layer
    number_format = Int(3, 48, scale_dtype="float32")
    start = number_format.quantize(weight_OI)
    found = refit(weight_OI, hessian_II.float(), start)
    factor_II = torch.linalg.cholesky(hessian_II)
    for row in range(3):
        base_I = start.parts["codes"][row].double() - start.parts["zeros"][row].double().repeat_interleave(48)[:160]
        groups_IN = torch.block_diag(*(part.unsqueeze(1) for part in base_I.split(48)))
        expected_N = torch.linalg.lstsq(factor_II.T @ groups_IN, factor_II.T @ weight_OI[row].double()).solution
        torch.testing.assert_close(found.parts["scales"][row].double(), expected_N, rtol=1e-3, atol=1e-4)
    assert torch.equal(found.parts["codes"], start.parts["codes"])


def test_a_row_whose_best_scales_are_not_positive_keeps_its_own(layer):
    weight_OI, hessian_II = layer
    start = Int(3, 40, symmetric=True).quantize(-weight_OI)
    found = refit(weight_OI, hessian_II.float(), start)
    assert torch.equal(found.parts["scales"], start.parts["scales"])


def test_a_group_of_zeros_keeps_its_scale_and_the_others_are_refitted(layer):
    weight_OI, hessian_II = layer
    weight_OI = weight_OI.clone()
    weight_OI[:, 40:80] = 0
    start = Int(2, 40).quantize(weight_OI)
    start.parts["codes"][:, 40:80] = start.parts["zeros"][:, 1:2]
    found = refit(weight_OI, hessian_II.float(), start)
    assert torch.equal(found.parts["scales"][:, 1], start.parts["scales"][:, 1])
    assert (found.parts["scales"] != start.parts["scales"]).any(1).float().mean() > 0.5


def test_rows_that_are_solved_apart_have_the_same_scales(layer, monkeypatch):
    weight_OI, hessian_II = layer
    start = Int(3, 40).quantize(weight_OI)
    together = refit(weight_OI, hessian_II.float(), start)
    monkeypatch.setattr(descent, "MOST_ELEMENTS", 1)
    apart = refit(weight_OI, hessian_II.float(), start)
    torch.testing.assert_close(apart.parts["scales"], together.parts["scales"], rtol=2e-3, atol=0)


@each_format
@pytest.mark.parametrize("panel", [128, 24])
def test_after_enough_sweeps_no_other_single_code_is_better(number_format, panel, layer, monkeypatch):
    monkeypatch.setattr(descent, "PANEL", panel)
    weight_OI, hessian_II = layer
    found = sweep(weight_OI, hessian_II.float(), number_format.quantize(weight_OI), sweeps=30)
    best_O = row_losses(weight_OI, hessian_II, found)
    codes = found.parts["codes"]
    spacing = number_format.spacing(found.parts)
    for column in (0, 37, 159):
        for by in (-1, 1):
            changed = codes.clone()
            changed[:, column] = (codes[:, column].int() + by).clamp(spacing.min_code, spacing.max_code).to(codes.dtype)
            neighbour = replace(found, parts={**found.parts, "codes": changed})
            assert (row_losses(weight_OI, hessian_II, neighbour) >= best_O * (1 - 1e-5)).all()


def test_gptq_descends_on_the_weight_that_it_was_given(layer):
    weight_OI, hessian_II = layer
    number_format = Int(2, 32)
    damped = damp(hessian_II)
    plain = Gptq().round(weight_OI, {"hessian": damped}, number_format)
    expected = descend(weight_OI, damped.hessian_II, plain, 3)
    found = Gptq(descent=3).round(weight_OI, {"hessian": damped}, number_format)
    assert torch.equal(found.dequantize(), expected.dequantize())


def test_settings_without_sense_are_refused():
    assert "descent needs evenly spaced values" in Gptq(descent=1).unsupported_reason(NormalFloat(4))
    assert Gptq(descent=1).unsupported_reason(MXInt(3)) is None
    with pytest.raises(ValueError, match=r"descent -1 is not an integer of at least 0 \(gptq\)"):
        Gptq(descent=-1)
