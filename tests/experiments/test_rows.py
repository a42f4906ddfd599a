"""The plan of the table against the contenders there are."""

from __future__ import annotations

import pytest
from kernel_benchmark import rows
from kernel_benchmark.contenders import VARIANTS

MOST_GEMV_ROWS = 4  # with more, gemlite takes the product that holds one scale per 32 weights


def test_every_contender_of_the_plan_exists():
    named = {bar.ours for bar in rows.BARS} | {name for bar in rows.BARS for _, name in bar.against}
    named |= {name for names in rows.EXTRA.values() for name in names}
    assert named <= VARIANTS.keys()


def test_every_group_has_rows_and_every_row_a_group():
    for group in rows.GROUPS.keys() - {"g"}:
        assert rows.scenes_of([group]), group
    assert {bar.group for bar in (*rows.BARS, rows.DECODER_BAR)} | {"extra"} == rows.GROUPS.keys()


def test_an_aim_is_beyond_what_is_asked_at_least():
    for bar in (*rows.BARS, rows.DECODER_BAR):
        if bar.at_least is not None and bar.aim is not None:
            assert (bar.aim > bar.at_least) == bar.times_faster, bar.label


@pytest.mark.parametrize("peer", ["humming", "gemlite"])
def test_weight_only_peers_are_met_in_five_shapes_with_one_and_sixteen_rows(peer):
    bars = [bar for bar in rows.BARS if any(name.startswith(peer) for _, name in bar.against)]
    assert len(bars) == 1
    assert {scene for scene, _ in bars[0].against} == {(*shape, m) for shape in rows.SHAPES for m in (1, 16)}
    assert len(set(rows.SHAPES)) == 5


def test_no_bar_meets_gemlite_where_its_results_are_wrong():
    for bar in rows.BARS:
        for scene, name in bar.against:
            assert name != "gemlite-int4-g16" or scene.m <= MOST_GEMV_ROWS


def test_scenes_hold_both_sides_of_every_bar_each_contender_once():
    plan = rows.scenes_of(list(rows.GROUPS))
    assert all(len(names) == len(set(names)) for names in plan.values())
    for bar in rows.BARS:
        for scene, against in bar.against:
            assert {bar.ours, against} <= set(plan[scene])


def test_only_the_asked_groups_are_planned():
    assert rows.scenes_of(["d"]) == {(8192, 8192, m): ["bf16", "w4a8-r32"] for m in (16, 32)}
    assert rows.scenes_of(["g"]) == {}
