"""Points of schemes: what their marks tell, and names that can be told apart."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest

from lqer.report.families import FEEDBACK, LATTICE, RTN
from lqer.report.marks import FAINT, draw_scheme, legend_of, name_schemes


@pytest.fixture
def axis():
    figure, axis = plt.subplots()
    axis.set(xlim=(2, 5), ylim=(10, 100), yscale="log")
    yield axis
    plt.close(figure)


def names(axis) -> list[str]:
    return [label.get_text() for label in axis.texts]


def test_neighbours_share_a_label_with_the_lowest_first(axis):
    name_schemes(axis, [("far", 4.0, 11.0), ("near", 3.0, 14.0), ("best", 3.08, 13.0)])
    assert names(axis) == ["best, near", "far"]


def test_points_above_each_other_keep_their_own_names(axis):
    name_schemes(axis, [("rtn", 3.6, 80.0), ("qera", 3.6, 40.0), ("best", 3.6, 20.0)])
    assert sorted(names(axis)) == ["best", "qera", "rtn"]


@pytest.mark.parametrize(("below", "sides"), [(True, ("right", "top")), (False, ("left", "bottom"))])
def test_a_name_stands_on_the_side_that_is_asked_for(axis, below, sides):
    name_schemes(axis, [("a", 3.0, 14.0), ("b", 3.0, 14.5)], below=below)
    (label,) = axis.texts
    assert (label.get_ha(), label.get_va()) == sides
    assert label.xy == (3.0, 14.0 if below else 14.5)


def test_what_is_beaten_is_faint_and_smaller(axis):
    draw_scheme(axis, 3, 20, LATTICE, is_best=True, is_filled=True)
    draw_scheme(axis, 3, 30, LATTICE, is_best=False, is_filled=True)
    best, beaten = axis.collections
    assert (best.get_alpha(), beaten.get_alpha()) == (1, FAINT)
    assert best.get_sizes() > beaten.get_sizes()


def test_an_open_point_has_only_the_edge_of_its_family(axis):
    draw_scheme(axis, 3, 20, FEEDBACK, is_best=True, is_filled=False)
    assert not len(axis.collections[0].get_facecolors())
    assert len(axis.collections[0].get_edgecolors()) == 1


def test_the_legend_names_the_families_that_there_are_in_their_order():
    assert [handle.get_label() for handle in legend_of({LATTICE, RTN})] == [
        "round to nearest", "lattice and trellis codes", "Pareto front", "original"
    ]  # fmt: skip
    assert "open: other libraries" in [handle.get_label() for handle in legend_of(set(), "other libraries")]
