"""Stage "widths": what formats add to the loss."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import resident
from killing import KilledError, dying_workspace
from measured_widths import FORMATS, SEED

from lqer.errors import ModelError
from lqer.formats import Int, MXInt
from lqer.models.backward import walk_backward
from lqer.models.structure import block_linears
from lqer.rounding import Gptq, Nearest
from lqer.stages.measure_widths import added_losses, plans_to_measure
from lqer.store.names import block_file
from lqer.transforms import Hadamard


@pytest.mark.parametrize("transform", [None, Hadamard()], ids=["plain", "rotated"])
def test_losses_are_those_of_the_equation(measured_widths, windows_WT, tmp_path, transform):
    """With rounding to nearest, written down once more; a rotated linear in its rotated basis."""
    nearest = {
        name: plan and replace(plan, rounding=Nearest(), transform=transform)
        for name, plan in measured_widths.plans.items()
    }
    measurable, windows = plans_to_measure(nearest, measured_widths.choices), len(windows_WT)
    found = measured_widths.measure(tmp_path, measurable, batch_size=windows)
    seen = {}
    for run in walk_backward(resident(measured_widths.model), windows_WT, windows, SEED):
        prefix, names = run.run.name, block_linears(run.run.block)
        run.backward({one: partial(lambda key, *pair: seen.__setitem__(key, pair), f"{prefix}.{one}") for one in names})
    for name in ("model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        weight_OI, (x_WTI, g_WTO) = measured_widths.model.get_submodule(name).weight.detach(), seen[name]
        if transform is not None:
            rotation = transform.rotation(*weight_OI.shape, seed=0)
            weight_OI, x_WTI = rotation.weight(weight_OI), rotation.input(x_WTI)
            g_WTO = rotation.output_gradient(g_WTO)
        for number_format, loss in zip(FORMATS, found[name], strict=True):
            error_OI = weight_OI - number_format.quantize(weight_OI).dequantize()
            of_rows_WO = (g_WTO * (x_WTI @ error_OI.T)).double().sum(1)
            expected = 0.5 * of_rows_WO.square().sum() / windows_WT.numel()
            assert loss == pytest.approx(float(expected), rel=1e-4)


def test_errors_fitted_to_few_tokens_cost_more_on_others():
    """Of normal inputs, two tokens to an input feature; rounding to nearest is fitted to none."""
    generator = torch.Generator().manual_seed(0)
    seen_BNI, unseen_BNI = torch.randn(2, 32, 4, 64, generator=generator)
    weight_OI, g_BNO = torch.randn(64, 64, generator=generator), torch.randn(32, 4, 64, generator=generator)
    tokens_NI = seen_BNI.flatten(0, 1)
    statistics = {"hessian": tokens_NI.T @ tokens_NI / len(tokens_NI)}
    errors = [
        weight_OI - rounding.round(weight_OI, statistics, MXInt(3)).dequantize() for rounding in (Gptq(), Nearest())
    ]
    fitted, nearest = added_losses(seen_BNI, g_BNO, errors) / added_losses(unseen_BNI, g_BNO, errors)
    assert fitted < 0.65
    assert nearest == pytest.approx(1, abs=0.1)


def test_linears_that_have_a_choice_are_measured_and_no_others(measured_widths):
    assert set(measured_widths.losses) == set(measured_widths.choices)


def test_every_further_bit_lowers_the_loss_about_fourfold(measured_widths):
    ratios = [values[i] / values[i + 1] for values in measured_widths.losses.values() for i in range(2)]
    assert min(ratios) > 1.5
    assert 3 < torch.tensor(ratios).median() < 9


def test_rotating_gradients_is_the_transpose_of_rotating_outputs_back():
    rotation = Hadamard().rotation(24, 40, seed=0)
    y_TO, g_TO = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close((rotation.output(y_TO) * g_TO).sum(), (y_TO * rotation.output_gradient(g_TO)).sum())


def test_a_killed_pass_resumes_after_the_last_block(measured_widths, tmp_path):
    with pytest.raises(KilledError):
        measured_widths.measure(tmp_path, measured_widths.measurable, make=dying_workspace(block_file(1)))
    assert measured_widths.measure(tmp_path, measured_widths.measurable) == measured_widths.losses


def test_a_rank_is_measured_beside_every_format(measured_widths):
    for name, values in measured_widths.both_losses.items():
        without, with_rank = values[: len(FORMATS)], values[len(FORMATS) :]
        assert without == pytest.approx(measured_widths.losses[name], rel=1e-6)
        assert all(0 < less < more for less, more in zip(with_rank, without, strict=True))


def test_what_decides_no_error_of_rounding_decides_no_loss(measured_widths):
    name, plans = "model.layers.0.self_attn.q_proj", measured_widths.plans
    other = {**plans, name: replace(plans[name], rank=16, activation=MXInt(8), weight=Int(4), asymmetric=0.5)}
    assert plans_to_measure(other, measured_widths.choices)[name] == measured_widths.measurable[name]


def test_a_linear_that_calibration_never_reached_is_named(measured_widths, tmp_path):
    class Empty:
        def __getattr__(self, name):
            return lambda index: {}

    with pytest.raises(ModelError, match=r"model.layers.2.* was never reached by the calibration text"):
        measured_widths.measure(tmp_path, measured_widths.measurable, calibration=Empty())
