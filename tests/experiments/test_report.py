"""The report as markdown and as JSON."""

from __future__ import annotations

import json

import pytest
from kernel_benchmark import report
from kernel_benchmark.results import Bar, Measurement, Scene, evaluate

SCENE = Scene(4096, 11008, 1)
LABELS = {"ours": "W4A8 + rank 32", "bf16": "cuBLAS bf16", "peer": "a peer"}
ENVIRONMENT = {
    "date": "2026-11-24",
    "command": "python experiments/benchmark_kernels.py",
    "gpu": "a GPU",
    "driver": "580.1",
    "versions": {"torch": "2.11.0", "gemlite": "not installed"},
    "l2_bytes": 60_000_000,
    "copy_bytes_per_second": 4.3e12,
    "matmul_operations_per_second": 7.9e14,
    "method": "Medians.",
}


@pytest.fixture
def result() -> dict:
    rows = [
        Measurement(SCENE, "ours", LABELS["ours"], 10.0, 0.013, 7.0, 1.7e-3, 6.0, 12),
        Measurement(SCENE, "bf16", LABELS["bf16"], 25.0, 0.002, 21.0, 1.6e-3, 21.0, 12),
        Measurement(SCENE, "peer", LABELS["peer"], problem="not installed: No module named 'peer'"),
    ]
    keyed = {(row.scene, row.contender): row for row in rows}
    bars = [
        evaluate(Bar("a", "one token", "ours", ((SCENE, name),), 0.6, 0.35), keyed, LABELS) for name in ("bf16", "peer")
    ]
    return report.to_report(ENVIRONMENT, bars, rows)


def test_json_contains_every_row_with_its_scene_and_reason(result):
    read = json.loads(json.dumps(result))
    assert read["schema_version"] == report.SCHEMA_VERSION
    assert read.keys() >= ENVIRONMENT.keys() | {"bars", "measurements"}
    assert [(row["k"], row["n"], row["m"]) for row in read["measurements"]] == [SCENE] * 3
    assert read["measurements"][2]["microseconds"] is None
    assert read["measurements"][2]["problem"] == "not installed: No module named 'peer'"
    assert [(bar["ratio"], bar["verdict"]) for bar in read["bars"]] == [(0.4, "pass"), (None, "not measured")]


def test_markdown_shows_both_sides_ratio_bars_and_verdict(result):
    text = report.markdown(result)
    assert "| a | one token | cuBLAS bf16 | 10.0 | 25.0 | 0.40x | 0.40x | 0.60x | 0.35x | pass |" in text
    assert "| 4096x11008 | 1 | W4A8 + rank 32 | 10.00 | 1.3% | 7.00 | 6.00 | 1.67 | 1.7e-03 | 12 |  |" in text


def test_markdown_names_missing_peers_and_the_environment(result):
    text = report.markdown(result)
    assert "not measured: a peer, 4096x11008, M=1: not installed: No module named 'peer' |" in text
    assert "2026-11-24, a GPU, driver 580.1, torch 2.11.0, gemlite not installed." in text
    assert "copy 4.30 TB/s" in text


def test_every_row_of_a_table_has_as_many_cells_as_its_header(result):
    cells = None
    for line in report.markdown(result).splitlines():
        if not line.startswith("|"):
            cells = None
            continue
        cells = cells or line.count("|")
        assert line.count("|") == cells, line
