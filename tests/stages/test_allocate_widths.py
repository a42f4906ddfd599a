"""The formats that follow from the losses under a budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import all_sites, quantize, resident
from width_choices import BLOCKS, FORMATS, OWN_FORMAT, SIZES, SKIPPED, calibrated, choices_of, measured, plans_of

from lqer.checkpoint.bits import average_bits
from lqer.errors import ConfigError
from lqer.stages.allocate_widths import allocate, check_widths, followed, options_of
from lqer.stages.gather import stored_statistics
from lqer.stages.measure_widths import plans_to_measure
from lqer.stages.quantize_linears import QuantizeSettings
from lqer.store.names import layers_file
from lqer.store.store import Workspace


@pytest.fixture(scope="module")
def model(random_model):
    return random_model("llama", **SIZES)


@pytest.fixture(scope="module")
def calibration(model, windows_WT, tmp_path_factory):
    return calibrated(model, windows_WT, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def plans(model):
    return plans_of(model)


@pytest.fixture(scope="module")
def choices(plans):
    return choices_of(plans)


@pytest.fixture(scope="module")
def shapes(model, plans):
    return {name: tuple(model.get_submodule(name).weight.shape) for name in plans}


@pytest.fixture(scope="module")
def options(plans, choices):
    """Of formats alone."""
    return options_of(plans, choices)


@pytest.fixture(scope="module")
def both_options(plans, choices):
    """Of formats without A and B, and then with them."""
    return options_of(plans, choices, optional_rank=True)


@pytest.fixture(scope="module")
def losses(model, calibration, plans, choices, windows_WT, tmp_path_factory):
    return measured(tmp_path_factory.mktemp("widths"), model, calibration, plans_to_measure(plans, choices), windows_WT)


@pytest.fixture(scope="module")
def both_losses(model, calibration, plans, choices, windows_WT, tmp_path_factory):
    """Of every format without A and B, and then with them."""
    measurable = plans_to_measure(plans, choices, optional_rank=True)
    return measured(tmp_path_factory.mktemp("both"), model, calibration, measurable, windows_WT)


@pytest.mark.parametrize("budget_bits", [4.9, 5.3, 5.9])
def test_the_models_bits_meet_the_budget_from_below_everything_counted(
    model, letter_tokenizer, calibration, plans, choices, options, losses, shapes, tmp_path, budget_bits
):
    widths = allocate(plans, options, losses, {}, shapes, budget_bits)
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
    assert widths.plans[OWN_FORMAT] == plans[OWN_FORMAT]
    assert widths.plans[SKIPPED] is None


@pytest.mark.parametrize("budget_bits", [3.9, 4.6])
def test_bits_of_a_chosen_rank_count_and_those_of_others_do_not(
    model, letter_tokenizer, calibration, plans, choices, both_options, both_losses, shapes, tmp_path, budget_bits
):
    widths = allocate(plans, both_options, both_losses, {}, shapes, budget_bits)
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


def test_a_rank_that_gains_nothing_is_not_taken(plans, choices, both_options, losses, shapes):
    nothing = {name: [*values, *values] for name, values in losses.items()}
    widths = allocate(plans, both_options, nothing, {}, shapes, 4.6)
    assert {widths.plans[name].rank for name in choices} == {0}


def test_a_rank_that_mends_everything_is_taken_before_bits(plans, choices, both_options, losses, shapes):
    mended = {name: [*values, *(0.0 for _ in values)] for name, values in losses.items()}
    widths = allocate(plans, both_options, mended, {}, shapes, 6.0)
    assert {(widths.plans[name].weight, widths.plans[name].rank) for name in choices} == {(FORMATS[0], 8)}


def test_a_linear_without_a_rank_chooses_among_formats_alone(plans, choices, losses, both_losses, shapes):
    name = "model.layers.0.self_attn.q_proj"
    without = {**plans, name: replace(plans[name], rank=0)}
    options = options_of(without, choices, optional_rank=True)
    widths = allocate(without, options, both_losses | {name: losses[name]}, {}, shapes, 8.0)
    assert widths.plans[name] == replace(without[name], weight=FORMATS[-1])
    assert widths.counts[-1] == len(choices) - 1


def test_tied_linears_that_share_an_input_get_one_format(calibration, plans, choices, options, losses, shapes):
    sites = all_sites(calibration)
    widths = allocate(plans, options, losses, sites, shapes, 5.3)
    formats: dict[str, set[int]] = {}
    for name in choices:
        formats.setdefault(sites[name], set()).add(widths.plans[name].weight.bits)
    assert all(len(bits) == 1 for bits in formats.values())
    assert len(set.union(*formats.values())) > 1
    assert widths.allocation.loss >= allocate(plans, options, losses, {}, shapes, 5.3).allocation.loss


def test_a_budget_below_the_narrowest_formats_is_refused_before_any_work(plans, options, shapes):
    with pytest.raises(ConfigError, match=r"quantize.budget_bits: must be at least 4\.768, the bits of .*; found 4\.7"):
        check_widths(plans, options, shapes, 4.7)
    check_widths(plans, options, shapes, 4.8)


def test_a_linear_that_no_gradient_reaches_gets_the_format_of_the_one_with_its_input_that_loses_most(
    plans, options, losses, shapes
):
    indexer, *others = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    unreached = {**losses, indexer: [0.0] * len(FORMATS)}
    sites = {name: name for name in losses} | dict.fromkeys([indexer, *others], "input")
    ties = followed(options, unreached, sites)
    assert ties == {indexer: max(others, key=lambda name: losses[name])}
    widths = [allocate(plans, options, unreached, one, shapes, 5.3).plans for one in ({}, ties)]
    assert widths[0][indexer].weight == FORMATS[0]
    assert widths[1][indexer].weight == widths[1][ties[indexer]].weight != FORMATS[0]


def test_linears_without_losses_that_share_an_input_with_no_other_get_the_narrowest_format(options, losses):
    """As of experts that the measured windows send no token to."""
    gate, up = (f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up"))
    unreached = losses | dict.fromkeys([gate, up], [0.0] * len(FORMATS))
    sites = {name: name for name in losses} | dict.fromkeys([gate, up], "input")
    assert set(followed(options, unreached, sites)) == {gate, up}
    assert len(set(followed(options, unreached, sites).values())) == 1
