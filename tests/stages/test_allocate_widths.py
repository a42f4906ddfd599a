"""The formats that follow from the losses under a budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import all_sites, quantize, resident
from measured_widths import BLOCKS, FORMATS, OWN_FORMAT, SKIPPED

from lqer.checkpoint.bits import average_bits
from lqer.errors import ConfigError
from lqer.stages.allocate_widths import allocate, check_widths, followed, options_of
from lqer.stages.gather import stored_statistics
from lqer.stages.quantize_linears import QuantizeSettings
from lqer.store.names import layers_file
from lqer.store.store import Workspace


@pytest.fixture(scope="module")
def options(measured_widths):
    """Of formats alone."""
    return options_of(measured_widths.plans, measured_widths.choices)


@pytest.fixture(scope="module")
def both_options(measured_widths):
    """Of formats without A and B, and then with them."""
    return options_of(measured_widths.plans, measured_widths.choices, optional_rank=True)


def quantized_bits(measured, letter_tokenizer, plans, folder):
    """Bits per weight of the checkpoint that the plans make, everything counted."""
    workspace, settings = Workspace(folder), QuantizeSettings(plans, None, 0)
    statistics_of = stored_statistics(measured.calibration)
    quantize(workspace, resident(measured.model), letter_tokenizer, statistics_of, settings)
    return average_bits([row for i in range(BLOCKS) for row in workspace.json(layers_file(i))])["average"]


@pytest.mark.parametrize("budget_bits", [4.9, 5.3, 5.9])
def test_the_models_bits_meet_the_budget_from_below_everything_counted(
    measured_widths, letter_tokenizer, options, tmp_path, budget_bits
):
    plans = measured_widths.plans
    widths = allocate(plans, options, measured_widths.losses, {}, measured_widths.shapes, budget_bits)
    stored = quantized_bits(measured_widths, letter_tokenizer, widths.plans, tmp_path)
    assert stored == pytest.approx(widths.average_bits, abs=1e-12)
    assert budget_bits - 0.2 < widths.average_bits <= budget_bits
    assert widths.allocation.loss <= widths.allocation.uniform_loss
    assert sum(widths.counts) == len(measured_widths.choices)
    assert widths.plans[OWN_FORMAT] == plans[OWN_FORMAT]
    assert widths.plans[SKIPPED] is None


@pytest.mark.parametrize("budget_bits", [3.9, 4.6])
def test_bits_of_a_chosen_rank_count_and_those_of_others_do_not(
    measured_widths, letter_tokenizer, both_options, tmp_path, budget_bits
):
    losses, choices = measured_widths.both_losses, measured_widths.choices
    widths = allocate(measured_widths.plans, both_options, losses, {}, measured_widths.shapes, budget_bits)
    stored = quantized_bits(measured_widths, letter_tokenizer, widths.plans, tmp_path)
    assert stored == pytest.approx(widths.average_bits, abs=1e-12)
    assert budget_bits - 0.2 < widths.average_bits <= budget_bits
    ranks = [widths.plans[name].rank for name in choices]
    assert widths.counts == tuple(
        sum(widths.plans[name].weight == one and widths.plans[name].rank == rank for name in choices)
        for rank in (0, 8) for one in FORMATS
    )  # fmt: skip
    assert set(ranks) <= {0, 8}


def test_a_rank_that_gains_nothing_is_not_taken(measured_widths, both_options):
    nothing = {name: [*values, *values] for name, values in measured_widths.losses.items()}
    widths = allocate(measured_widths.plans, both_options, nothing, {}, measured_widths.shapes, 4.6)
    assert {widths.plans[name].rank for name in measured_widths.choices} == {0}


def test_a_rank_that_mends_everything_is_taken_before_bits(measured_widths, both_options):
    mended = {name: [*values, *(0.0 for _ in values)] for name, values in measured_widths.losses.items()}
    widths = allocate(measured_widths.plans, both_options, mended, {}, measured_widths.shapes, 6.0)
    chosen = {(widths.plans[name].weight, widths.plans[name].rank) for name in measured_widths.choices}
    assert chosen == {(FORMATS[0], 8)}


def test_a_linear_without_a_rank_chooses_among_formats_alone(measured_widths):
    name, plans, choices = "model.layers.0.self_attn.q_proj", measured_widths.plans, measured_widths.choices
    without = {**plans, name: replace(plans[name], rank=0)}
    losses = measured_widths.both_losses | {name: measured_widths.losses[name]}
    options = options_of(without, choices, optional_rank=True)
    widths = allocate(without, options, losses, {}, measured_widths.shapes, 8.0)
    assert widths.plans[name] == replace(without[name], weight=FORMATS[-1])
    assert widths.counts[-1] == len(choices) - 1


def test_tied_linears_that_share_an_input_get_one_format(measured_widths, options):
    sites = all_sites(measured_widths.calibration)

    def widths_of(ties):
        return allocate(measured_widths.plans, options, measured_widths.losses, ties, measured_widths.shapes, 5.3)

    tied = widths_of(sites)
    formats: dict[str, set[int]] = {}
    for name in measured_widths.choices:
        formats.setdefault(sites[name], set()).add(tied.plans[name].weight.bits)
    assert all(len(bits) == 1 for bits in formats.values())
    assert len(set.union(*formats.values())) > 1
    assert tied.allocation.loss >= widths_of({}).allocation.loss


def test_a_budget_below_the_narrowest_formats_is_refused_before_any_work(measured_widths, options):
    plans, shapes = measured_widths.plans, measured_widths.shapes
    with pytest.raises(ConfigError, match=r"quantize.budget_bits: must be at least 4\.768, the bits of .*; found 4\.7"):
        check_widths(plans, options, shapes, 4.7)
    check_widths(plans, options, shapes, 4.8)


def test_a_linear_that_no_gradient_reaches_gets_the_format_of_the_one_with_its_input_that_loses_most(
    measured_widths, options
):
    plans, losses, shapes = measured_widths.plans, measured_widths.losses, measured_widths.shapes
    indexer, *others = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    unreached = {**losses, indexer: [0.0] * len(FORMATS)}
    sites = {name: name for name in losses} | dict.fromkeys([indexer, *others], "input")
    ties = followed(options, unreached, sites)
    assert ties == {indexer: max(others, key=lambda name: losses[name])}
    widths = [allocate(plans, options, unreached, one, shapes, 5.3).plans for one in ({}, ties)]
    assert widths[0][indexer].weight == FORMATS[0]
    assert widths[1][indexer].weight == widths[1][ties[indexer]].weight != FORMATS[0]


def test_linears_without_losses_that_share_an_input_with_no_other_get_the_narrowest_format(measured_widths, options):
    """As of experts that the measured windows send no token to."""
    losses = measured_widths.losses
    gate, up = (f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up"))
    unreached = losses | dict.fromkeys([gate, up], [0.0] * len(FORMATS))
    sites = {name: name for name in losses} | dict.fromkeys([gate, up], "input")
    assert set(followed(options, unreached, sites)) == {gate, up}
    assert len(set(followed(options, unreached, sites).values())) == 1
