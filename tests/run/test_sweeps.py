"""The sweep scripts run every combination once, stop at a failure unless told to go on, and end with a table."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# One experiment as a job array has a test of its own.
OTHERS = ("common.sh", "slurm_chunks.sh")
SWEEPS = sorted(path for path in (ROOT / "sweeps").glob("*.sh") if path.name not in OTHERS)


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """Stands in for the interpreter: notes its arguments, and fails for the tags named in $FAIL."""
    path = tmp_path / "python"
    path.write_text('#!/usr/bin/env bash\necho "$*" >> "$CALLS"\n[[ -z "${FAIL:-}" || "$*" != *"$FAIL"* ]]\n')
    path.chmod(0o755)
    return path


def sweep(script: Path, recorder: Path, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    calls = recorder.with_name("calls.txt")
    calls.unlink(missing_ok=True)
    done = subprocess.run(
        [str(script), *arguments],
        env=os.environ | {"PYTHON": str(recorder), "CALLS": str(calls)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, calls.read_text().splitlines() if calls.exists() else []


def test_the_sweeps_are_there():
    assert [path.stem for path in SWEEPS] == [
        "baseline_no_lqer", "block_methods", "gptvq", "lqer_act", "lqer_act_int", "lqer_act_weight_only", "lqer_svd"
    ]  # fmt: skip


@pytest.mark.parametrize("script", SWEEPS, ids=lambda path: path.stem)
class TestSweep:
    def test_each_combination_is_one_run_with_a_tag_of_its_own_then_a_table(self, script, recorder):
        status, calls = sweep(script, recorder, "some.toml", "tag")
        assert status == 0
        *runs, table = calls
        tags = [call.split()[2] for call in runs]
        assert len(runs) >= 4
        assert len(set(tags)) == len(tags)
        assert all(tag.startswith("tag-") for tag in tags)
        assert "collect_results.py" in table

    def test_every_combination_is_a_valid_experiment(self, script, recorder):
        from lqer.config import read_config

        _, calls = sweep(script, recorder, str(ROOT / "configs/template/opt-125m.toml"), "tag")
        for call in calls[:-1]:
            words = re.split(r" (?=--)", call.split(" ", 2)[2])
            read_config(ROOT / "configs/template/opt-125m.toml", words[0], words[1:])

    def test_a_failure_stops_the_sweep(self, script, recorder):
        _, calls = sweep(script, recorder, "some.toml", "tag")
        second = calls[1].split()[2]
        status, calls = sweep(script, recorder, "some.toml", "tag", FAIL=f" {second} ")
        assert status == 1
        assert len(calls) == 2

    def test_a_failure_is_passed_over_and_told_at_the_end_when_asked_to_go_on(self, script, recorder):
        _, whole = sweep(script, recorder, "some.toml", "tag")
        failing = whole[0].split()[2]
        status, calls = sweep(script, recorder, "some.toml", "tag", FAIL=f" {failing} ", KEEP_GOING="1")
        assert status == 1
        assert len(calls) == len(whole)

    def test_further_overrides_are_handed_to_every_run(self, script, recorder):
        _, calls = sweep(script, recorder, "some.toml", "tag", "--model=other/model")
        assert all(call.endswith("--model=other/model") for call in calls[:-1])

    def test_without_its_arguments_it_says_how_it_is_used(self, script, recorder):
        status, calls = sweep(script, recorder, "some.toml")
        assert status == 2
        assert calls == []


def test_a_sweep_runs_end_to_end_and_again_without_work(experiment, tmp_path):
    script = tmp_path / "small.sh"
    text = (ROOT / "sweeps/lqer_svd.sh").read_text()
    text = text.replace("weights=(w4 w3 w2)", "weights=(w3)").replace("ranks=(32 64)", "ranks=(4 8)")
    script.write_text(text.replace('"$(dirname "$0")/common.sh"', f'"{ROOT}/sweeps/common.sh"'))
    script.chmod(0o755)
    environment = os.environ | {"OUTPUT_DIR": str(experiment.output)}
    command = [str(script), str(experiment.config), "sweep"]
    first = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert "| sweep-w3-r4 |" in first.stdout
    assert (experiment.output / "sweep-table" / "results.csv").exists()
    artifacts = {path: path.stat().st_mtime_ns for path in (experiment.output / "store").glob("*/manifest.json")}
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert artifacts == {
        path: path.stat().st_mtime_ns for path in (experiment.output / "store").glob("*/manifest.json")
    }
