"""Widths under one budget in a whole run: what is stored, what is reused, what a chunk does."""

from __future__ import annotations

import json

import pytest

from lqer.config import read_config
from lqer.errors import ConfigError
from lqer.run.pipeline import run

WIDTHS = ['--quantize.widths=["w2", "w3", "w4"]', "--quantize.budget_bits=5.6"]


def stored_bits(folder) -> dict[str, int]:
    linears = json.loads((folder / "checkpoint/lqer.json").read_text())["linears"]
    return {name: entry["weight"]["format"]["bits"] for name, entry in linears.items()}


@pytest.mark.parametrize("method", ["lqer-act", "gptq"])
def test_a_run_stays_within_its_budget_with_several_formats(experiment, caplog, method):
    rank = "--quantize.low_rank.rank=8"
    results = run(read_config(experiment.config, method, [*WIDTHS, f"--quantize.method={method}", rank]))
    assert 5.3 < results["bits"]["average"] <= 5.6
    bits = stored_bits(experiment.output / method)
    assert len(set(bits.values())) > 1
    assert set(bits.values()) <= {2, 3, 4}
    assert "of 5.6 bits" in caplog.text
    widths = results["widths"]
    assert widths["linears"] == {f"w{width}": list(bits.values()).count(width) for width in (2, 3, 4)}
    assert widths["average_bits"] == pytest.approx(results["bits"]["average"])
    assert widths["objective"] <= widths["uniform_objective"]
    report = (experiment.output / method / "report.md").read_text()
    assert f"{widths['linears']['w3']} linears in `w3`" in report
    # The baseline has the same formats, without A and B.
    assert results["baseline"]["bits"]["average"] < results["bits"]["average"]
    assert results["baseline"]["bits"]["weight"] == results["bits"]["weight"]


@pytest.mark.parametrize("method", ["lqer-act", "gptq"])
def test_a_rank_is_one_of_the_choices(experiment, caplog, method):
    rank = ["--quantize.low_rank={ rank = 8, optional = true }", "--quantize.budget_bits=4.4"]
    results = run(read_config(experiment.config, method, [*WIDTHS, f"--quantize.method={method}", *rank]))
    assert 4.1 < results["bits"]["average"] <= 4.4
    widths = results["widths"]
    assert widths["average_bits"] == pytest.approx(results["bits"]["average"])
    assert list(widths["linears"]) == ["w2", "w3", "w4", "w2 with A and B", "w3 with A and B", "w4 with A and B"]
    linears = json.loads((experiment.output / method / "checkpoint/lqer.json").read_text())["linears"]
    taken = sum(count for name, count in widths["linears"].items() if "A and B" in name)
    assert sum("low_rank_a" in entry for entry in linears.values()) == taken
    assert "with A and B" in caplog.text
    assert (results["bits"]["low_rank"] > 0) == (taken > 0)


def test_another_budget_measures_nothing_anew(experiment, caplog):
    run(read_config(experiment.config, "first", WIDTHS))
    caplog.clear()
    run(read_config(experiment.config, "second", [*WIDTHS, "--quantize.budget_bits=6.1"]))
    assert "widths: reused" in caplog.text
    first, second = (sum(stored_bits(experiment.output / tag).values()) for tag in ("first", "second"))
    assert first < second


def test_statistics_that_widths_alone_read_count_as_seconds_of_calibration(experiment):
    results = run(read_config(experiment.config, "sequential", [*WIDTHS, "--quantize.order=sequential"]))
    (manifest,) = experiment.output.glob("store/calibrate-*/manifest.json")
    assert results["seconds"]["calibrate"] == json.loads(manifest.read_text())["seconds"] > 0


def test_unseen_windows_measure_losses_anew(experiment, caplog):
    run(read_config(experiment.config, "first", WIDTHS))
    caplog.clear()
    few = ["--calibration.num_samples=4", "--quantize.widths_text=unseen"]
    seen = run(read_config(experiment.config, "seen", [*WIDTHS, few[0]]))
    unseen = run(read_config(experiment.config, "unseen", [*WIDTHS, *few]))
    assert "widths: reused" not in caplog.text
    assert seen["calibration"] == unseen["calibration"]
    assert seen["widths"]["uniform_objective"] != unseen["widths"]["uniform_objective"]


def test_a_format_of_an_override_is_kept(experiment):
    override = '--quantize.override=[{ match = "*.v_proj", weight = "x8" }]'
    run(read_config(experiment.config, "kept", [*WIDTHS, "--quantize.budget_bits=6", override]))
    bits = stored_bits(experiment.output / "kept")
    assert {width for name, width in bits.items() if name.endswith("v_proj")} == {8}
    assert {width for name, width in bits.items() if not name.endswith("v_proj")} <= {2, 3, 4}


def test_a_budget_that_nothing_fits_is_refused_before_any_work(experiment):
    with pytest.raises(ConfigError, match=r"quantize.budget_bits: must be at least \d\.\d+, the bits of the narrowest"):
        run(read_config(experiment.config, None, [*WIDTHS, "--quantize.budget_bits=3"]))
    assert not experiment.output.exists()
