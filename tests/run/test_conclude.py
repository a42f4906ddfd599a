"""What the end of a sweep says."""

from __future__ import annotations

from lqer.report.sweep import SweepRecord
from lqer.run.conclude import conclude
from lqer.run.sweep import SweepOutcome


def test_runs_that_fail_alike_share_a_line(caplog, tmp_path):
    record = SweepRecord("a.toml", "c.toml", "t", "x", {})
    conclude(record, tmp_path, SweepOutcome((), {"one": "no text", "two": "no text", "three": "no model"}, ()), print)
    assert [found.message for found in caplog.records] == ["failed: one, two: no text", "failed: three: no model"]
