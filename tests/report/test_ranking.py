"""What beats what among the runs of one model, and what is recommended within a budget."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest

from lqer.config.reader import parse_override
from lqer.errors import ConfigError, DataError
from lqer.report.ranking import mean_accuracy, rank
from lqer.report.ranking_figure import save_ranking
from lqer.report.recommend import Budget, find_atlas, lines, overrides, parse_budget, recommend
from lqer.report.sweep import RECORD_FILE, SweepRecord, shown_table
from lqer.results import SCHEMA_VERSION
from lqer.store.files import content_hash

FORMATS = {"x8": {"kind": "mxint", "bits": 8, "block_size": 16}}


def results(
    bits: float, perplexity: float | None, activation: str = "none", kl: float | None = None, **changes: Any
) -> dict:
    text = {"dataset": "wiki", "protocol": "concat", "seq_len": 64, "tokens": 630, "fingerprint": "0f" * 32}
    divergence = None if kl is None else {"quantized": {"kl_mean": kl}}
    return {
        "schema_version": SCHEMA_VERSION,
        "config": {
            "formats": FORMATS,
            "quantize": {"method": {"kind": "gptq"}, "weight": "w4", "activation": activation},
        },
        "model": {"name": "some/model", "fingerprint": "abc"},
        "bits": {"average": bits},
        "checkpoint_bytes": int(bits * 1e9),
        "perplexity": [text | {"original": 5.0, "quantized": perplexity, "divergence": divergence}],
        "downstream": [],
        "seconds": {"quantize": 60.0, "finetune": 0.0},
        "peak_memory_bytes": 2 * 10**9,
    } | changes


RUNS = {
    "two": results(2.0, 12.0),
    "three": results(3.0, 8.0),
    "wasteful": results(3.5, 9.0),
    "four": results(4.0, 6.0),
    "three-x8": results(3.2, 8.5, "x8"),
    "bad-x8": results(4.5, 8.6, "x8"),
    "broken": results(4.1, None),
}


def test_a_front_holds_what_no_run_with_as_few_bits_beats():
    (ranking,) = rank(RUNS)
    (criterion,) = ranking.criteria
    assert list(ranking.table["run"][ranking.front(criterion)]) == ["two", "three", "three-x8", "four"]


def test_a_scheme_with_rounded_activations_is_not_beaten_by_a_weight_only_one():
    (ranking,) = rank(RUNS)
    beaten = dict(zip(ranking.table["run"], ranking.beaten_by()))
    assert beaten["three-x8"] == ""
    assert beaten["bad-x8"] == "three-x8"
    assert beaten["wasteful"] == "three"


def test_a_run_without_a_finite_value_is_dominated():
    (ranking,) = rank(RUNS)
    assert dict(zip(ranking.table["run"], ranking.beaten_by()))["broken"] == "four"


def test_the_table_shows_the_original_then_the_front_then_what_is_beaten():
    (ranking,) = rank(RUNS)
    table = shown_table(ranking)
    assert list(table["run"]) == [
        "original", "two", "three", "three-x8", "four", "wasteful", "broken", "bad-x8"
    ]  # fmt: skip
    assert list(table["wiki"]) == ["5", "**12**", "**8**", "**8.5**", "**6**", "9", "", "8.6"]
    assert list(table["activations"])[3] == "x8"


def test_models_and_measurements_are_not_mixed():
    other = results(2.0, 3.0, model={"name": "other", "fingerprint": "def"})
    longer = results(2.5, 3.0)
    longer["perplexity"][0] |= {"seq_len": 128}
    first, second = rank({"a": RUNS["two"], "b": other, "c": longer})
    assert [ranking.model for ranking in (first, second)] == ["model", "other"]
    assert [criterion.column for criterion in first.criteria] == [
        "wiki (concat 64, 630 tokens, 0f0f0f0f)", "wiki (concat 128, 630 tokens, 0f0f0f0f)"
    ]  # fmt: skip


def task(name: str, metric: str, value: float, stderr: float | None) -> dict:
    return {"task": name, "metric": metric, "original": None, "quantized": value, "stderr": stderr}


def test_accuracy_is_the_mean_of_one_metric_per_task():
    tasks = [task("a", "acc", 0.2, 0.03), task("a", "acc_norm", 0.4, 0.03), task("b", "acc", 0.6, 0.04)]
    mean, error = mean_accuracy([*tasks, task("c", "perplexity", 30.0, 1.0)], "quantized")
    assert (mean, error) == (pytest.approx(0.5), pytest.approx(0.05 / 2))
    assert math.isnan(mean_accuracy([*tasks, task("d", "acc", 0.5, None)], "quantized")[1])
    assert mean_accuracy(tasks, "original") is None
    assert mean_accuracy([], "quantized") is None


def test_more_accuracy_is_better():
    runs = {name: results(bits, 9.0) for name, bits in (("a", 3.0), ("b", 3.5))}
    for (name, run), value in zip(runs.items(), (0.6, 0.5), strict=True):
        runs[name] = run | {"downstream": [task("t", "acc", value, 0.01)]}
    (ranking,) = rank(runs)
    accuracy = ranking.criteria[-1]
    assert list(ranking.front(accuracy)) == [True, False]
    assert list(shown_table(ranking)["mean accuracy"]) == ["", "**0.6 ± 0.01**", "0.5 ± 0.01"]


def test_a_column_that_no_run_fills_is_left_out():
    (ranking,) = rank({"a": RUNS["two"], "b": RUNS["three"]})
    assert {"activations", "tokens/s"}.isdisjoint(shown_table(ranking).columns)
    (ranking,) = rank({"a": RUNS["two"] | {"tokens_per_second": {"quantized": 123.4}}, "b": RUNS["three-x8"]})
    shown = shown_table(ranking)
    assert list(shown["tokens/s"]) == ["", "123.4", ""]
    assert list(shown["activations"]) == ["", "", "x8"]


def test_runs_that_measured_no_text_are_shown_by_what_they_cost():
    timed = results(4.0, None, tokens_per_second={"quantized": 450.0}) | {"perplexity": []}
    (ranking,) = rank({"timed": timed, "not timed": results(3.0, None) | {"perplexity": []}})
    shown = shown_table(ranking)
    assert dict(zip(shown["run"], shown["tokens/s"])) == {"original": "", "not timed": "", "timed": "450"}
    assert not shown["beaten by"].any()


def test_every_run_has_the_colour_of_its_family(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "lqer.report.ranking_figure.draw_scheme",
        lambda axis, x, y, family, **marks: drawn.append((x, family.name, marks["is_best"], marks["is_filled"])),
    )
    (ranking,) = rank({name: RUNS[name] for name in ("two", "wasteful", "three", "three-x8")})
    save_ranking(tmp_path / "picture.png", ranking, ranking.criteria, "title")
    assert drawn[:4] == [
        (2.0, "error feedback", True, True), (3.0, "error feedback", True, True),
        (3.2, "error feedback", True, False), (3.5, "error feedback", False, True),
    ]  # fmt: skip


def test_the_picture_is_drawn_where_values_are_missing_or_ruined(tmp_path):
    runs = {**RUNS, "ruined": results(2.1, 1e6, kl=9.0)}
    (ranking,) = rank(runs)
    save_ranking(tmp_path / "picture.png", ranking, ranking.criteria, "title")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


class TestRecommend:
    def test_the_best_within_the_budget_is_chosen(self):
        (ranking,) = rank(RUNS)
        found = recommend(ranking, Budget(bits=3.6))
        assert found.best["run"] == "three"
        assert list(found.others["run"]) == ["three-x8", "wasteful", "two"]

    def test_a_size_and_the_bits_of_activations_limit_it_too(self):
        (ranking,) = rank(RUNS)
        assert recommend(ranking, Budget(size=2_500_000_000)).best["run"] == "two"
        assert recommend(ranking, Budget(bits=5, activation_bits=9)).best["run"] == "three-x8"

    def test_what_misses_the_budget_by_little_and_is_better_is_told(self):
        (ranking,) = rank(RUNS)
        found = recommend(ranking, Budget(bits=2.9))
        assert (found.best["run"], list(found.above["run"])) == ("two", ["three"])
        run = {"tag": "t", "extends": [], "scheme": {}}
        record = SweepRecord("a.toml", "c.toml", "t", "x", dict.fromkeys(RUNS, run))
        told = "\n".join(lines(found, ranking, record, Budget(bits=2.9)))
        assert "| three | 3.000 | 3 | 0.67 | 8 |" in told
        assert "three is better, and a little above the budget." in told
        assert recommend(ranking, Budget(bits=2.5)).above.empty

    def test_divergence_decides_where_it_was_measured(self):
        (ranking,) = rank({"a": results(3, 8.0, kl=0.5), "b": results(3, 8.1, kl=0.4)})
        assert recommend(ranking, Budget(bits=3)).best["run"] == "b"

    def test_nothing_within_the_budget_is_said_with_the_least_there_is(self):
        (ranking,) = rank(RUNS)
        with pytest.raises(DataError, match=r"no measured scheme is within 1\.5 bits; .*: 2 bits, 2 GB"):
            recommend(ranking, Budget(bits=1.5))

    def test_what_is_printed_names_preset_overrides_command_and_what_it_beats(self):
        (ranking,) = rank(RUNS)
        budget = Budget(bits=3.6)
        scheme = {"quantize": {"weight": "w3g64"}}
        run = {"tag": "t-three", "extends": ["preset:serve-3"], "scheme": scheme}
        runs = {"three": run, "slow": run}
        record = SweepRecord("sweeps/atlas.toml", "c.toml", "t", "lqer sweep a", runs)
        text = "\n".join(lines(recommend(ranking, budget), ranking, record, budget))
        assert "preset:serve-3" in text
        assert "overrides  --quantize.weight=w3g64" in text
        assert "lqer sweep a --only three" in text
        assert "| run | bits | GB | ratio | wiki |" in text
        assert "| original | 16 |  |  | 5 |" in text
        assert "| three | 3.000 | 3 | 1.00 | 8 |" in text
        assert "| wasteful | 3.500 | 3.5 | 1.13 | 9 |" in text
        assert "ratio: perplexity relative to three (wiki).\n" in text
        assert "Not measured: slow. To add them:\n  lqer sweep a" in text

    @pytest.mark.parametrize(
        ("given", "told"),
        [
            ((None, None, None), "expected --bits 3.2 or --size 4GB"),
            (("three", None, None), "--bits: must be a number of bits; found 'three'"),
            ((None, "4 gibbons", None), "--size: must be bytes or a size"),
            (("nan", None, None), "--bits: must be a number of bits"),
        ],
    )
    def test_a_mistake_in_the_budget_is_one_line(self, given, told):
        with pytest.raises(ConfigError, match=told):
            parse_budget(*given)

    def test_overrides_are_read_back_as_they_were(self):
        scheme = {"formats": {"q": {"kind": "int", "bits": 3}}, "quantize": {"transforms": ["awq"], "tie": "true"}}
        read = [parse_override(word) for word in shlex.split(overrides(scheme))]
        assert read == [
            {"formats": {"q": {"kind": "int", "bits": 3}}}, {"quantize": {"transforms": ["awq"]}},
            {"quantize": {"tie": "true"}},
        ]  # fmt: skip


class TestFindAtlas:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for tag, sweep in (("mine", "sweeps/atlas.toml"), ("other", "sweeps/lqer_act.toml")):
            record = {"sweep": sweep, "config": "c", "tag": tag, "command": "x"}
            made_by = content_hash(RUNS["two"]["config"])
            record["runs"] = {name: {"tag": f"{tag}-{name}", "config": made_by} for name in ("two", "three")}
            (tmp_path / f"{tag}-table").mkdir()
            (tmp_path / f"{tag}-table" / RECORD_FILE).write_text(json.dumps(record))
            (tmp_path / f"{tag}-two").mkdir()
            (tmp_path / f"{tag}-two/results.json").write_text(json.dumps(RUNS["two"]))
        return tmp_path

    def test_it_is_found_by_the_model_with_the_runs_that_are_finished(self, folder):
        record, ranking = find_atlas(folder, "some/model", "abc", None)
        assert (record.tag, list(ranking.table["run"])) == ("mine", ["two"])

    def test_results_of_another_configuration_under_the_same_tag_do_not_count(self, folder):
        stale = RUNS["three"] | {"config": {"quantize": {}}}
        (folder / "mine-three").mkdir()
        (folder / "mine-three/results.json").write_text(json.dumps(stale))
        assert list(find_atlas(folder, "some/model", "abc", None)[1].table["run"]) == ["two"]

    def test_any_sweep_can_be_named(self, folder):
        assert find_atlas(folder, "some/model", "abc", "other")[0].tag == "other"

    def test_without_one_the_command_that_makes_it_is_named(self, folder):
        with pytest.raises(DataError, match=r"no atlas of new/model under .*: lqer sweep atlas CONFIG TAG"):
            find_atlas(folder, "new/model", "def", None)

    def test_a_misspelt_tag_is_answered_with_those_there_are(self, folder):
        with pytest.raises(DataError, match=r"--atlas mien: .*; there are mine, other; did you mean 'mine'"):
            find_atlas(folder, "some/model", "abc", "mien")
