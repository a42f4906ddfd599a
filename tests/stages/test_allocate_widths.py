"""Stage "widths" and the formats that follow from it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import all_sites, quantize, resident
from killing import KilledError, dying_workspace

from lqer.checkpoint.bits import average_bits
from lqer.errors import ConfigError, ModelError
from lqer.formats import Int, MXInt
from lqer.methods import LinearPlan, QeraExact
from lqer.models.backward import walk_backward
from lqer.models.structure import block_linears, find_blocks
from lqer.rounding import Gptq, Nearest
from lqer.stages.allocate_widths import (
    added_losses,
    allocate,
    check_widths,
    measure_widths,
    plans_to_measure,
)
from lqer.stages.calibrate import calibrate
from lqer.stages.gather import CalibrationText, stored_statistics
from lqer.stages.quantize_linears import QuantizeSettings
from lqer.statistics import Hessian
from lqer.store.names import block_file, layers_file
from lqer.store.store import Store, Workspace
from lqer.transforms import Hadamard

BLOCKS, SEED = 3, 1
FORMATS = (MXInt(2), MXInt(3), MXInt(4))


@pytest.fixture(scope="module")
def model(random_model):
    return random_model("llama", num_hidden_layers=BLOCKS, hidden_size=64, intermediate_size=96)


@pytest.fixture(scope="module")
def calibration(model, windows_WT, tmp_path_factory):
    text, store = CalibrationText(windows_WT, 2, 8), Store(tmp_path_factory.mktemp("store"))
    return store.obtain("calibrate", 0, lambda ws: calibrate(ws, resident(model), text, {Hessian()}))


@pytest.fixture(scope="module")
def plans(model) -> dict[str, LinearPlan | None]:
    """GPTQ with factors of a small rank; one linear is skipped."""
    plan = LinearPlan(QeraExact(), MXInt(3), rank=8, factor=MXInt(8, 8), rounding=Gptq())
    name, blocks = find_blocks(model)
    plans: dict[str, LinearPlan | None] = {
        f"{name}.{i}.{linear}": plan for i, block in enumerate(blocks) for linear in block_linears(block)
    }
    plans["model.layers.1.mlp.up_proj"] = None
    return plans


@pytest.fixture(scope="module")
def choices(plans):
    """One linear has a format of its own."""
    fixed = "model.layers.0.mlp.down_proj"
    return {name: FORMATS for name, plan in plans.items() if plan is not None and name != fixed}


@pytest.fixture(scope="module")
def shapes(model, plans):
    return {name: tuple(model.get_submodule(name).weight.shape) for name in plans}


def measured(folder, model, calibration, plans, windows_WT, batch_size=2, make=Workspace):
    workspace = make(folder)
    measure_widths(workspace, resident(model), calibration, plans, FORMATS, windows_WT, batch_size, SEED)
    return {name: x.tolist() for i in range(BLOCKS) for name, x in workspace.tensors(block_file(i)).items()}


@pytest.fixture(scope="module")
def losses(model, calibration, plans, choices, windows_WT, tmp_path_factory):
    found = measured(
        tmp_path_factory.mktemp("widths"), model, calibration, plans_to_measure(plans, choices), windows_WT
    )
    assert set(found) == {f"{name}.losses" for name in choices}
    return {name.removesuffix(".losses"): values for name, values in found.items()}


@pytest.mark.parametrize("transform", [None, Hadamard()], ids=["plain", "rotated"])
def test_losses_are_those_of_the_equation(model, calibration, plans, choices, windows_WT, tmp_path, transform):
    """With rounding to nearest, written down once more; a rotated linear in its rotated basis."""
    nearest = {name: plan and replace(plan, rounding=Nearest(), transform=transform) for name, plan in plans.items()}
    windows = len(windows_WT)
    found = measured(tmp_path, model, calibration, plans_to_measure(nearest, choices), windows_WT, windows)
    seen = {}
    for run in walk_backward(resident(model), windows_WT, windows, SEED):
        prefix, names = run.run.name, block_linears(run.run.block)
        run.backward({one: partial(lambda key, *pair: seen.__setitem__(key, pair), f"{prefix}.{one}") for one in names})
    for name in ("model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        weight_OI, (x_WTI, g_WTO) = model.get_submodule(name).weight.detach(), seen[name]
        if transform is not None:
            rotation = transform.rotation(*weight_OI.shape, seed=0)
            weight_OI, x_WTI = rotation.weight(weight_OI), rotation.input(x_WTI)
            g_WTO = rotation.output_gradient(g_WTO)
        for number_format, loss in zip(FORMATS, found[f"{name}.losses"], strict=True):
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


def test_every_further_bit_lowers_the_loss_about_fourfold(losses):
    ratios = [values[i] / values[i + 1] for values in losses.values() for i in range(2)]
    assert min(ratios) > 1.5
    assert 3 < torch.tensor(ratios).median() < 9


def test_rotating_gradients_is_the_transpose_of_rotating_outputs_back():
    rotation = Hadamard().rotation(24, 40, seed=0)
    y_TO, g_TO = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close((rotation.output(y_TO) * g_TO).sum(), (y_TO * rotation.output_gradient(g_TO)).sum())


def test_a_killed_pass_resumes_after_the_last_block(model, calibration, plans, choices, losses, windows_WT, tmp_path):
    measurable = plans_to_measure(plans, choices)
    with pytest.raises(KilledError):
        measured(tmp_path, model, calibration, measurable, windows_WT, make=dying_workspace(block_file(1)))
    found = measured(tmp_path, model, calibration, measurable, windows_WT)
    assert found == {f"{name}.losses": values for name, values in losses.items()}


@pytest.mark.parametrize("budget_bits", [4.9, 5.3, 5.9])
def test_the_models_bits_meet_the_budget_from_below_everything_counted(
    model, letter_tokenizer, calibration, plans, choices, losses, shapes, tmp_path, budget_bits
):
    widths = allocate(plans, choices, losses, {}, shapes, budget_bits)
    workspace = Workspace(tmp_path)
    quantize(
        workspace,
        resident(model),
        letter_tokenizer,
        stored_statistics(calibration),
        QuantizeSettings(widths.plans, None, 0),
    )
    rows = [row for i in range(BLOCKS) for row in workspace.json(layers_file(i))]
    assert average_bits(rows)["average"] == pytest.approx(widths.average_bits, abs=1e-12)
    assert budget_bits - 0.2 < widths.average_bits <= budget_bits
    assert widths.allocation.loss <= widths.allocation.uniform_loss
    assert sum(widths.counts) == len(choices)
    assert widths.plans["model.layers.0.mlp.down_proj"] == plans["model.layers.0.mlp.down_proj"]
    assert widths.plans["model.layers.1.mlp.up_proj"] is None


@pytest.fixture(scope="module")
def both_losses(model, calibration, plans, choices, windows_WT, tmp_path_factory):
    """Of every format without A and B, and then with them."""
    measurable = plans_to_measure(plans, choices, optional_rank=True)
    found = measured(tmp_path_factory.mktemp("both"), model, calibration, measurable, windows_WT)
    return {name.removesuffix(".losses"): values for name, values in found.items()}


def test_a_rank_is_measured_beside_every_format(losses, both_losses):
    for name, values in both_losses.items():
        without, with_rank = values[: len(FORMATS)], values[len(FORMATS) :]
        assert without == pytest.approx(losses[name], rel=1e-6)
        assert all(0 < less < more for less, more in zip(with_rank, without, strict=True))


@pytest.mark.parametrize("budget_bits", [3.9, 4.6])
def test_bits_of_a_chosen_rank_count_and_those_of_others_do_not(
    model, letter_tokenizer, calibration, plans, choices, both_losses, shapes, tmp_path, budget_bits
):
    widths = allocate(plans, choices, both_losses, {}, shapes, budget_bits, optional_rank=True)
    settings, workspace = QuantizeSettings(widths.plans, None, 0), Workspace(tmp_path)
    quantize(workspace, resident(model), letter_tokenizer, stored_statistics(calibration), settings)
    rows = [row for i in range(BLOCKS) for row in workspace.json(layers_file(i))]
    assert average_bits(rows)["average"] == pytest.approx(widths.average_bits, abs=1e-12)
    assert budget_bits - 0.2 < widths.average_bits <= budget_bits
    ranks = [widths.plans[name].rank for name in choices]
    assert widths.counts == tuple(
        sum(widths.plans[name].weight == one and widths.plans[name].rank == rank for name in choices)
        for rank in (0, 8) for one in FORMATS
    )  # fmt: skip
    assert set(ranks) <= {0, 8}


def test_a_rank_that_gains_nothing_is_not_taken(plans, choices, losses, shapes):
    nothing = {name: [*values, *values] for name, values in losses.items()}
    widths = allocate(plans, choices, nothing, {}, shapes, 4.6, optional_rank=True)
    assert {widths.plans[name].rank for name in choices} == {0}


def test_a_rank_that_mends_everything_is_taken_before_bits(plans, choices, losses, shapes):
    mended = {name: [*values, *(0.0 for _ in values)] for name, values in losses.items()}
    widths = allocate(plans, choices, mended, {}, shapes, 6.0, optional_rank=True)
    assert {(widths.plans[name].weight, widths.plans[name].rank) for name in choices} == {(FORMATS[0], 8)}


def test_a_linear_without_a_rank_chooses_among_formats_alone(plans, choices, losses, both_losses, shapes):
    name = "model.layers.0.self_attn.q_proj"
    without = {**plans, name: replace(plans[name], rank=0)}
    widths = allocate(without, choices, both_losses | {name: losses[name]}, {}, shapes, 8.0, optional_rank=True)
    assert widths.plans[name] == replace(without[name], weight=FORMATS[-1])
    assert widths.counts[-1] == len(choices) - 1


def test_tied_linears_that_share_an_input_get_one_format(calibration, plans, choices, losses, shapes):
    sites = all_sites(calibration)
    widths = allocate(plans, choices, losses, sites, shapes, 5.3)
    formats: dict[str, set[int]] = {}
    for name in choices:
        formats.setdefault(sites[name], set()).add(widths.plans[name].weight.bits)
    assert all(len(bits) == 1 for bits in formats.values())
    assert len(set.union(*formats.values())) > 1
    assert widths.allocation.loss >= allocate(plans, choices, losses, {}, shapes, 5.3).allocation.loss


def test_what_decides_no_error_of_rounding_decides_no_loss(plans, choices):
    name = "model.layers.0.self_attn.q_proj"
    other = {**plans, name: replace(plans[name], rank=16, activation=MXInt(8), weight=Int(4), asymmetric=0.5)}
    assert plans_to_measure(other, choices)[name] == plans_to_measure(plans, choices)[name]


def test_a_budget_below_the_narrowest_formats_is_refused_before_any_work(plans, choices, shapes):
    with pytest.raises(ConfigError, match=r"quantize.budget_bits: must be at least 4\.768, the bits of .*; found 4\.7"):
        check_widths(plans, choices, shapes, 4.7)
    check_widths(plans, choices, shapes, 4.8)


def test_a_linear_that_calibration_never_reached_is_named(model, calibration, plans, choices, windows_WT, tmp_path):
    class Empty:
        def __getattr__(self, name):
            return lambda index: {}

    with pytest.raises(ModelError, match=r"model.layers.2.* was never reached by the calibration text"):
        measured(tmp_path, model, Empty(), plans_to_measure(plans, choices), windows_WT)
