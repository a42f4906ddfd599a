from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from lqer.report import figures


@pytest.fixture
def saved(monkeypatch) -> list[Figure]:
    """The figures that would be written."""
    kept: list[Figure] = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: kept.append(figure))
    return kept


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_steps_and_rounds_are_counted_in_whole_numbers(saved, tmp_path, count):
    errors = {f"model.layers.{block}.mlp.up_proj": [0.5, 0.2] * count for block in range(2)}
    figures.save_step_errors(tmp_path / "a.png", errors, ("reconstruct", "round"), "error")
    figures.save_block_losses(tmp_path / "b.png", [[1.0] + [0.5] * count])
    for figure in saved:
        axis = figure.axes[0]
        assert all(place == round(place) for place in axis.get_xticks())
    assert [axis.get_title() for axis in saved[0].axes] == ["mlp.up_proj", ""]


def test_both_steps_of_every_block_are_drawn(saved, tmp_path):
    errors = {"model.layers.0.mlp.up_proj": [0.9, 0.3, 0.2, 0.1], "model.layers.1.mlp.up_proj": [0.8, 0.4, 0.3, 0.2]}
    figures.save_step_errors(tmp_path / "a.png", errors, ("reconstruct", "round"), "error")
    drawn = [list(line.get_ydata()) for line in saved[0].axes[0].lines]
    assert drawn == [[0.9, 0.2], [0.3, 0.1], [0.8, 0.3], [0.4, 0.2]]


def test_block_losses_are_relative_to_their_start(saved, tmp_path):
    figures.save_block_losses(tmp_path / "a.png", [[2.0, 1.0], [10.0, 4.0]])
    assert [list(line.get_ydata()) for line in saved[0].axes[0].lines] == [[1.0, 0.5], [1.0, 0.4]]
