from __future__ import annotations

import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from report_runs import KINDS, layers_table

from lqer.report import layer_figures
from lqer.report.families import LOW_RANK, RTN


@pytest.fixture
def saved(monkeypatch) -> list[Figure]:
    """The figures that would be written."""
    kept: list[Figure] = []
    monkeypatch.setattr(layer_figures, "save", lambda figure, path: kept.append(figure))
    return kept


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_steps_and_rounds_are_counted_in_whole_numbers(saved, tmp_path, count):
    errors = {f"model.layers.{block}.mlp.up_proj": [0.5, 0.2] * count for block in range(2)}
    layer_figures.save_step_errors(tmp_path / "a.png", errors, ("reconstruct", "round"), "error")
    layer_figures.save_block_losses(tmp_path / "b.png", [[1.0] + [0.5] * count])
    for figure in saved:
        axis = figure.axes[0]
        assert all(place == round(place) for place in axis.get_xticks())
    assert [axis.get_title() for axis in saved[0].axes] == ["up", ""]


def test_both_steps_of_every_block_are_drawn(saved, tmp_path):
    errors = {"model.layers.0.mlp.up_proj": [0.9, 0.3, 0.2, 0.1], "model.layers.1.mlp.up_proj": [0.8, 0.4, 0.3, 0.2]}
    layer_figures.save_step_errors(tmp_path / "a.png", errors, ("reconstruct", "round"), "error")
    drawn = [list(line.get_ydata()) for line in saved[0].axes[0].lines]
    assert drawn == [[0.9, 0.2], [0.3, 0.1], [0.8, 0.3], [0.4, 0.2]]


def test_block_losses_are_relative_to_their_start(saved, tmp_path):
    layer_figures.save_block_losses(tmp_path / "a.png", [[2.0, 1.0], [10.0, 4.0]])
    assert [list(line.get_ydata()) for line in saved[0].axes[0].lines] == [[1.0, 0.5], [1.0, 0.4]]


def test_output_errors_have_a_panel_for_every_kind_and_a_curve_over_the_blocks(saved, tmp_path):
    layer_figures.save_output_errors(tmp_path / "a.png", layers_table(4), RTN, LOW_RANK)
    panels = saved[0].axes[: len(KINDS)]
    assert [axis.get_title() for axis in panels] == ["q", "k", "v", "o", "up", "down"]
    before, after = panels[0].lines
    assert list(before.get_xdata()) == [0, 1, 2, 3]
    assert list(after.get_ydata()) == pytest.approx([0.01, 0.02, 0.03, 0.04])
    assert [to_hex(line.get_color()).upper() for line in (before, after)] == [RTN.colour, LOW_RANK.colour]


def test_many_experts_share_the_panel_of_their_last_name(saved, tmp_path):
    names = [f"model.layers.{b}.mlp.experts.{e}.{w}" for b in range(2) for e in range(16) for w in ("w1", "w2")]
    table = pd.DataFrame({"name": names, "rank": 0, "output_error": 0.1, "output_error_before": 0.1})
    layer_figures.save_output_errors(tmp_path / "a.png", table, RTN, RTN)
    assert [axis.get_title() for axis in saved[0].axes if axis.lines] == ["w1", "w2"]


def test_errors_of_experts_are_drawn_over_the_tokens_that_they_were_sent(saved, tmp_path):
    """One that was sent none at half a token; linears that are no expert's are left out."""
    layer = "model.layers.0.mlp.experts"
    table = pd.DataFrame(
        [
            ("model.layers.0.self_attn.q_proj", None, 0.9),
            (f"{layer}.0.up_proj", 700, 0.1),
            (f"{layer}.1.up_proj", 0, 0.4),
            (f"{layer}.0.down_proj", 700, 0.2),
        ],
        columns=["name", "routed_tokens", "output_error"],
    ).astype({"routed_tokens": "Int64"})
    layer_figures.save_routing(tmp_path / "a.png", table, 512)
    (axis,) = saved[0].axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}
    assert drawn["up_proj"] == ([700, 0.5], [0.1, 0.4])
    assert drawn["down_proj"] == ([700], [0.2])
    assert drawn["calibration.min_expert_tokens"][0] == [512, 512]
    assert len(drawn) == 3
