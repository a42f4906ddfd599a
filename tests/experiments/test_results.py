"""The arithmetic of the bars: means, verdicts, missing times."""

from __future__ import annotations

import pytest
from kernel_benchmark.results import Bar, Measurement, Scene, evaluate, geometric_mean, judge

FIRST, SECOND = Scene(4096, 4096, 1), Scene(8192, 8192, 16)
LABELS = {"ours": "ours", "peer": "a peer", "other": "another"}


def measured(scene: Scene, contender: str, microseconds: float | None, problem: str | None = None) -> Measurement:
    return Measurement(scene, contender, contender, microseconds, problem=problem)


def keyed(*measurements: Measurement) -> dict:
    return {(row.scene, row.contender): row for row in measurements}


def test_half_and_double_have_the_geometric_mean_one():
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert geometric_mean([1.0, 4.0, 16.0]) == pytest.approx(4.0)


@pytest.mark.parametrize("values", [[], [1.0, 0.0], [-1.0]])
def test_a_geometric_mean_needs_positive_values(values):
    with pytest.raises(ValueError, match="positive"):
        geometric_mean(values)


@pytest.mark.parametrize(
    ("ratio", "times_faster", "verdict"),
    [
        (0.42, False, "aim"), (0.43, False, "pass"), (0.60, False, "pass"), (0.61, False, "short"),
        (0.61, True, "aim"), (0.60, True, "aim"), (0.43, True, "pass"), (0.41, True, "short"),
    ],
)  # fmt: skip
def test_a_bar_is_an_inclusive_bound_in_its_direction(ratio, times_faster, verdict):
    at_least, aim = (0.42, 0.60) if times_faster else (0.60, 0.42)
    assert judge(ratio, at_least, aim, times_faster) == verdict


def test_a_comparison_without_a_bar_has_no_verdict():
    assert judge(7.0, None, None, False) == "no bar"


def test_a_bar_over_scenes_judges_the_geometric_mean_and_names_the_worst():
    bar = Bar("b", "row", "ours", ((FIRST, "peer"), (SECOND, "other")), at_least=1.1, aim=0.9)
    rows = keyed(
        measured(FIRST, "ours", 5.0), measured(FIRST, "peer", 10.0),
        measured(SECOND, "ours", 20.0), measured(SECOND, "other", 10.0),
    )  # fmt: skip
    result = evaluate(bar, rows, LABELS)
    assert (result.verdict, result.worst) == ("pass", 2.0)
    assert result.ratio == pytest.approx(1.0)
    assert result.against == "a peer / another"
    assert result.microseconds == pytest.approx(10.0)


def test_times_faster_inverts_the_ratio_and_its_worst_is_the_smallest():
    bar = Bar("f", "row", "ours", ((FIRST, "peer"), (SECOND, "peer")), at_least=5, aim=40, times_faster=True)
    rows = keyed(
        measured(FIRST, "ours", 1.0), measured(FIRST, "peer", 4.0),
        measured(SECOND, "ours", 1.0), measured(SECOND, "peer", 16.0),
    )  # fmt: skip
    result = evaluate(bar, rows, LABELS)
    assert (result.ratio, result.worst, result.verdict) == (pytest.approx(8.0), 4.0, "pass")


def test_a_missing_time_on_either_side_is_reported_with_its_reason():
    bar = Bar("b", "row", "ours", ((FIRST, "peer"),), at_least=1.0)
    absent = measured(FIRST, "peer", None, "not installed: No module named 'peer'")
    result = evaluate(bar, keyed(measured(FIRST, "ours", 1.0), absent), LABELS)
    assert result.verdict == "not measured"
    assert result.ratio is None
    assert result.problem == "a peer, 4096x4096, M=1: not installed: No module named 'peer'"
    assert evaluate(bar, {}, LABELS).problem == "ours, 4096x4096, M=1: not run"
