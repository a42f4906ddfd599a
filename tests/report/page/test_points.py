"""What a page compares, taken from results.json."""

from __future__ import annotations

import shlex

import pytest
from report_runs import quantize_table, run_results

from lqer.report.families import LOW_RANK, RTN
from lqer.report.front import pareto_front
from lqer.report.page.points import candidates_of, measures_of, originals_of


def test_a_run_with_factors_is_compared_with_its_baseline():
    reconstructed, plain = candidates_of(run_results("a", 5.0, {"c4": 6.0}, plain=9.0))
    assert (reconstructed.scheme, reconstructed.family, reconstructed.bits) == (
        "lqer-act + fine-tuning", LOW_RANK, 5.0,
    )  # fmt: skip
    assert (plain.scheme, plain.family, plain.bits, plain.rank) == ("RTN", RTN, 4.5, "0")
    assert [value for measure, value in plain.values.items() if measure.quantity == "perplexity"] == [9.0]


def test_a_scheme_without_factors_is_its_own_baseline():
    assert len(candidates_of(run_results("a", 4.0, {"c4": 9.0}, 9.0, quantize_table("none", rank=0)))) == 1


def test_the_parts_of_the_bits_are_named_and_add_up():
    (one,) = candidates_of(run_results("a", 5.0, {}))
    assert list(one.parts) == ["codes", "scales", "zeros", "signs", "A and B"]
    assert sum(one.parts.values()) == pytest.approx(one.bits)


def test_a_run_made_before_zero_points_were_told_apart_is_still_shown():
    results = run_results("a", 5.0, {})
    for part in ("zeros", "signs"):
        del results["bits"][part]
    one = candidates_of(results)[0]
    assert list(one.parts) == ["codes", "scales, zeros and signs", "A and B"]
    assert sum(one.parts.values()) == pytest.approx(5.0)


def test_the_command_reads_the_resolved_configuration():
    (one,) = candidates_of(run_results("my tag", 5.0, {}))
    assert shlex.split(one.command) == ["lqer", "run", "checkpoints/my tag/config.toml"]


def test_measures_are_equal_only_if_everything_agrees():
    first, second = run_results("a", 5.0, {"c4": 6.0}), run_results("b", 4.0, {"c4": 7.0})
    second["perplexity"][0]["tokens"] = 2000
    candidates = [*candidates_of(first), *candidates_of(second)]
    perplexities = [one for one in measures_of(candidates, originals_of(first)) if one.quantity == "perplexity"]
    assert [one.protocol for one in perplexities] == [
        "concat, seq_len 2048, 1000 tokens",
        "concat, seq_len 2048, 2000 tokens",
    ]


def test_a_value_that_is_missing_is_no_point():
    (one,) = candidates_of(run_results("a", 5.0, {"c4": None}))
    assert not [measure for measure in one.values if measure.quantity == "perplexity"]


def test_accuracy_is_better_when_higher_and_the_perplexity_of_a_task_when_lower():
    results = run_results("a", 5.0, {})
    task = {"original": 0.5, "rtn": None, "quantized": 0.4, "stderr": 0.1, "num_fewshot": 0, "samples": 10}
    results["downstream"] = [
        {"task": "piqa", "metric": "acc", **task},
        {"task": "lambada", "metric": "perplexity", **task},
    ]
    (one,) = candidates_of(results)
    assert [measure.lower_is_better for measure in one.values] == [False, True]


@pytest.mark.parametrize(("lower_is_better", "front"), [(True, [0, 1, 4]), (False, [0, 3])])
def test_the_front_holds_exactly_what_no_other_point_beats(lower_is_better, front):
    assert pareto_front([3, 4, 4, 5, 6, 7], [9.0, 7.0, 8.0, 9.5, 6.0, 6.0], lower_is_better) == front
