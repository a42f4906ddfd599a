"""The charts of a page hold the numbers they show."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from report_runs import KINDS, layers_table, quantize_table, run_results, spectra

from lqer.report.families import LOW_RANK, RTN
from lqer.report.page import charts
from lqer.report.page.points import candidates_of, originals_of


@pytest.fixture
def compared():
    """A weight-only scheme, one that rounds activations too, and the latter's baseline; the measure; the original."""
    weights_only = run_results("b", 4.2, {"c4": 8.0}, None, quantize_table("none", rank=0, activation="none"))
    results = run_results("a", 5.0, {"c4": 6.0}, plain=9.0)
    candidates = [*candidates_of(results), *candidates_of(weights_only)]
    measure, original = next(iter(originals_of(results).items()))
    return candidates, measure, original


def traces(chart) -> dict[str, dict]:
    return {trace["name"]: trace for trace in chart["data"]}


def test_every_candidate_is_a_point_of_its_family_and_knows_its_place(compared):
    candidates, measure, original = compared
    found = traces(charts.pareto(candidates, measure, original))
    assert list(found) == ["with x8", RTN.name, LOW_RANK.name]
    for name in (RTN.name, LOW_RANK.name):
        for x, y, place in zip(found[name]["x"], found[name]["y"], found[name]["customdata"], strict=True):
            assert (x, y) == (candidates[place].bits, candidates[place].values[measure])
    assert found["with x8"]["x"] == [4.5, 5.0]


def test_what_is_dominated_is_faint_and_rounded_activations_are_open(compared):
    candidates, measure, original = compared
    worse = replace(candidates[2], values={measure: 10.0}, bits=4.3)
    points = traces(charts.pareto([*candidates, worse], measure, original))[RTN.name]
    looks = dict(zip(points["customdata"], zip(points["marker"]["opacity"], points["marker"]["symbol"])))
    assert looks == {1: (1, "square-open"), 2: (1, "square"), 3: (0.6, "square")}


def test_a_weight_only_scheme_beats_none_that_rounds_activations(compared):
    candidates, measure, original = compared
    plain = replace(candidates[2], values={measure: 5.5})
    better = replace(candidates[0], values={measure: 5.4}, bits=4.1)
    found = traces(charts.pareto([*candidates[:2], plain], measure, original))
    assert found["with x8"]["x"] == [4.5, 5.0]
    found = traces(charts.pareto([better, candidates[1], plain], measure, original))
    assert [name for name in found if name.startswith(("Pareto", "with"))] == []
    assert found[RTN.name]["marker"]["opacity"] == [0.6, 0.6]


def test_the_front_is_named_by_what_tells_its_runs_apart(compared):
    candidates, measure, original = compared
    tags = ("atlas-serve-3", "atlas-serve-4", "atlas-rtn")
    bits, values = (3.0, 4.0, 4.5), (9.0, 8.0, 8.5)
    named = [
        replace(candidates[2], tag=tag, bits=at, values={measure: value})
        for tag, at, value in zip(tags, bits, values, strict=True)
    ]
    (points,) = [trace for trace in charts.pareto(named, measure, original)["data"] if "text" in trace]
    assert points["text"] == ["serve-3", "serve-4", ""]
    near = [named[0], replace(named[1], bits=3.05), named[2]]
    (points,) = [trace for trace in charts.pareto(near, measure, original)["data"] if "text" in trace]
    assert points["text"] == ["", "serve-4", ""]


def test_a_run_alone_is_not_named_beside_its_point(compared):
    candidates, measure, original = compared
    found = traces(charts.pareto(candidates[:1], measure, original))
    assert found[LOW_RANK.name]["text"] == [""]


def test_ruined_models_do_not_squeeze_the_others(compared):
    candidates, measure, original = compared
    ruined = replace(candidates[2], values={measure: 5e5}, bits=2.0)
    chart = charts.pareto([*candidates, ruined], measure, original)
    assert chart["layout"]["yaxis"]["range"][1] < 20
    assert any("1 above 150" in note["text"] for note in chart["layout"]["annotations"])


def test_a_point_tells_its_bits_in_parts_its_protocol_and_its_command(compared):
    candidates, measure, _ = compared
    text = charts.hover(candidates[0], measure).replace("<br>", " ")
    for part in ("4.000 codes", "0.150 zeros", "0.500 A and B", "seq_len 2048", "lqer run checkpoints/a/config.toml"):
        assert part in text


def test_over_the_size_only_what_has_one_is_a_point(compared):
    candidates, measure, original = compared
    sized = [replace(one, size=size) for one, size in zip(candidates, (0.5, None, 0.4), strict=True)]
    found = traces(charts.pareto(sized, measure, original, charts.COSTS[1]))
    assert (found[LOW_RANK.name]["x"], found[RTN.name]["x"]) == ([0.5], [0.4])
    assert "0.5 GB" in charts.hover(sized[0], measure)


@pytest.mark.parametrize(("values", "kind"), [([5.0, 9.0], None), ([5.0, 400.0], "log"), ([-1.0, 400.0], None)])
def test_an_axis_is_logarithmic_only_where_values_span_a_wide_range(values, kind):
    scale = charts.axis_scale(values)
    assert scale.get("type") == kind
    low, high = (math.log10(value) if kind else value for value in values)
    assert scale["range"][0] < low < high < scale["range"][1]


def test_a_heat_map_has_the_kinds_by_the_blocks():
    heat = charts.heat_map(layers_table(4), "output_error", "error", logarithmic=True)["data"][0]
    assert (heat["x"], heat["y"]) == ([0, 1, 2, 3], ["q", "k", "v", "o", "up", "down"])
    assert heat["z"][0] == pytest.approx(np.log10([0.01, 0.02, 0.03, 0.04]), rel=1e-4)
    assert heat["text"][0] == ["0.01", "0.02", "0.03", "0.04"]


@pytest.mark.parametrize(("blocks", "ticks"), [(5, {"dtick": 1}), (40, {"nticks": 12})])
def test_few_blocks_have_a_tick_each_and_none_in_between(blocks, ticks):
    axis = charts.heat_map(layers_table(blocks), "output_error", "error")["layout"]["xaxis"]
    assert {key: axis[key] for key in ("dtick", "nticks") if key in axis} == ticks


def test_a_heat_map_leaves_out_what_has_no_logarithm():
    layers = layers_table(2).assign(output_error=0.0)
    heat = charts.heat_map(layers, "output_error", "error", logarithmic=True)["data"][0]
    assert heat["z"] == [[None, None]] * len(KINDS)


def test_losses_of_a_block_start_at_one():
    (curve, _) = charts.block_losses([[4.0, 2.0, 1.0], [3.0, 3.0]])["data"]
    assert (curve["x"], curve["y"]) == ([0, 1, 2], [1.0, 0.5, 0.25])


def test_fine_tuning_marks_the_epoch_that_is_evaluated():
    found = traces(charts.finetune_losses([2.0, 1.8, 1.9], 1.5, 1))
    assert (found["evaluated"]["x"], found["evaluated"]["y"]) == ([1], [1.8])
    assert found["original model"]["y"] == [1.5, 1.5]


def test_long_spectra_are_thinned_and_keep_both_ends():
    name = "model.layers.2.self_attn.q_proj"
    (curve,) = charts.spectra({f"{name}.weight": 1 / np.arange(1, 4097)}, [name], "weight")["data"]
    assert len(curve["x"]) == charts.MOST_POINTS
    assert (curve["x"][0], curve["x"][-1]) == (1, 4096)
    assert all(curve["y"])


def test_a_spectrum_has_a_curve_for_every_linear():
    linears = [f"model.layers.2.{kind}" for kind in KINDS]
    assert list(traces(charts.spectra(spectra(), linears, "plain"))) == ["q", "k", "v", "o", "up", "down"]


def test_candidates_of_nearly_the_same_size_stand_above_each_other():
    low, high = charts.axis_range([3.59, 3.61], charts.LEAST_SPAN)
    assert (low + high) / 2 == pytest.approx(3.6)
    assert high - low == pytest.approx(0.25 * 3.6)
    assert charts.axis_range([2.0, 4.0], charts.LEAST_SPAN) == charts.axis_range([2.0, 4.0])
