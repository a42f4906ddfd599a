"""The plan of the benchmark: contenders exist, and scenes contain both sides of every bar."""

from __future__ import annotations

from kernel_benchmark import rows
from kernel_benchmark.contenders import VARIANTS


def test_every_contender_of_the_plan_exists():
    named = {bar.ours for bar in rows.BARS} | {name for bar in rows.BARS for _, name in bar.against}
    named |= {name for names in rows.EXTRA.values() for name in names}
    assert named <= VARIANTS.keys()


def test_scenes_contain_both_sides_of_every_bar_each_contender_once():
    plan = rows.scenes_of(list(rows.GROUPS))
    assert all(len(names) == len(set(names)) for names in plan.values())
    for bar in rows.BARS:
        for scene, against in bar.against:
            assert {bar.ours, against} <= set(plan[scene])


def test_only_the_wanted_groups_are_planned():
    assert rows.scenes_of(["d"]) == {(8192, 8192, m): ["bf16", "w4a8-r32"] for m in (16, 32)}
    assert rows.scenes_of(["g"]) == {}
