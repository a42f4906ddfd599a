"""The result as markdown and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from kernel_benchmark.results import BarResult, Measurement, Scene

SCHEMA_VERSION = 2


def markdown(report: dict[str, Any]) -> str:
    """The environment, then tables of the bars and all measurements."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"{report['date']}, {report['gpu']}, driver {report['driver']}, {versions}.",
        f"Command: `{report['command']}`",
        f"Measured here: copy {report['copy_bytes_per_second'] / 1e12:.2f} TB/s (read and written bytes), "
        f"bf16 product {report['matmul_operations_per_second'] / 1e12:.0f} TFLOP/s, "
        f"L2 cache {report['l2_bytes'] / 1e6:.0f} MB. {report['method']}",
    ]
    for head, cells in (
        (_BAR_HEAD, [_bar_cells(bar) for bar in report["bars"]]),
        (_MEASUREMENT_HEAD, [_measurement_cells(row) for row in report["measurements"]]),
    ):
        if cells:
            lines += ["", *_table(head, cells)]
    return "\n".join(lines) + "\n"


def to_report(
    environment: dict[str, Any], bars: Sequence[BarResult], measurements: Sequence[Measurement]
) -> dict[str, Any]:
    """The JSON report: schema_version, the environment's keys, then bars and measurements as lists."""
    rows = []
    for measurement in measurements:
        row = dataclasses.asdict(measurement)
        row.pop("scene")
        rows.append({**measurement.scene._asdict(), **row})
    return {
        "schema_version": SCHEMA_VERSION,
        **environment,
        "bars": [dataclasses.asdict(bar) for bar in bars],
        "measurements": rows,
    }


_BAR_HEAD = (
    "", "row", "against", "ours us", "theirs us", "ratio", "worst scene", "at least", "aim", "verdict",
)  # fmt: skip
_MEASUREMENT_HEAD = (
    "K x N", "M", "contender", "us", "spread", "L2-warm us", "floor us", "us / floor", "error", "copies", "",
)  # fmt: skip


def _bar_cells(bar: dict[str, Any]) -> list[str]:
    unit = "x faster" if bar["times_faster"] else "x"
    verdict = bar["verdict"] + (f": {bar['problem']}" if bar["problem"] else "")
    return [
        bar["group"],
        bar["label"],
        bar["against"],
        _number(bar["microseconds"], ".1f"),
        _number(bar["against_microseconds"], ".1f"),
        *(_number(bar[name], ".2f", unit) for name in ("ratio", "worst", "at_least", "aim")),
        verdict,
    ]


def _measurement_cells(row: dict[str, Any]) -> list[str]:
    scene = Scene(row["k"], row["n"], row["m"])
    time, floor = row["microseconds"], row["floor_microseconds"]
    return [
        f"{scene.k}x{scene.n}",
        str(scene.m),
        row["label"],
        _number(time, ".2f"),
        _number(row["spread"], ".1%"),
        _number(row["warm_microseconds"], ".2f"),
        _number(floor, ".2f"),
        _number(None if time is None or floor is None else time / floor, ".2f"),
        _number(row["error"], ".1e"),
        _number(row["copies"], "d"),
        row["problem"] or "",
    ]


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
