"""Trial processes: logs, deaths, restarts. The processes are small scripts, no GPU is involved."""

from __future__ import annotations

import os
import sys

import pytest
from kernel_benchmark import measure, trial
from kernel_benchmark.results import Scene

JOBS = [(Scene(64, 48, 1), name) for name in ("fine", "absent", "deadly", "late")]

# Behaves as run_worker does, with jobs that stand for what can happen.
WORKER = """
import json, os, sys, time
log = sys.argv[3]
begun = {json.loads(line)["position"] for line in open(log)} if os.path.exists(log) else set()
def write(position, state, problem=None):
    entry = {"position": position, "state": state, "problem": problem, "time": time.time()}
    with open(log, "a") as stream:
        print(json.dumps(entry), file=stream)
for position, outcome in enumerate(OUTCOMES):
    if position in begun:
        continue
    write(position, "started")
    if outcome == "die":
        os._exit(9)
    write(position, "ended", outcome)
"""


@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


def trials(tmp_path, outcomes) -> dict:
    script = tmp_path / "worker.py"
    script.write_text(f"OUTCOMES = {outcomes!r}\n{WORKER}")
    return trial.run_trials(JOBS, [sys.executable, str(script)], dict(os.environ))


def test_a_death_costs_its_own_job_and_the_rest_is_still_tried(tmp_path, one_process):
    problems = trials(tmp_path, [None, "not installed: peer", "die", None])
    assert problems == {JOBS[1]: "not installed: peer", JOBS[2]: "its trial process died"}


def test_a_process_that_cannot_start_leaves_its_jobs_to_the_table(tmp_path, one_process):
    assert trial.run_trials(JOBS, [sys.executable, str(tmp_path / "absent.py")], dict(os.environ)) == {}


def test_a_job_cut_short_is_a_problem_only_after_it_had_long_enough():
    started = [{"position": 0, "state": "started", "problem": None, "time": 100.0}]
    assert trial._problems(started, JOBS, hanging=True, now=110.0) == {}
    late = trial._problems(started, JOBS, hanging=True, now=101.0 + trial.HANGING_SECONDS)
    assert late == {JOBS[0]: "no result after 76 s in a process of its own"}


def test_a_worker_tries_its_share_that_no_predecessor_began(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(measure, "try_once", lambda scene, name: tried.append(name))
    log = tmp_path / "0.jsonl"
    assert trial.run_worker(JOBS, 0, 2, log) == 0
    assert tried == ["fine", "deadly"]
    assert trial.run_worker(JOBS, 0, 2, log) == 0
    assert tried == ["fine", "deadly"]


def test_a_worker_logs_what_a_job_raised_and_leaves_once_the_gpu_is_lost(tmp_path, monkeypatch):
    def fails(scene, name):
        raise RuntimeError("an illegal memory access was encountered")

    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(measure, "try_once", fails)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr("torch.cuda.synchronize", lost)
    log = tmp_path / "0.jsonl"
    assert trial.run_worker(JOBS, 0, 1, log) == trial.DIED
    problems = trial._problems(trial._entries(log), JOBS, hanging=False, now=0.0)
    assert problems == {JOBS[0]: "RuntimeError: an illegal memory access was encountered"}


def test_what_compiles_longest_is_tried_first():
    plan = {Scene(64, 48, 1): ["bf16", "humming-int4-g16"], Scene(64, 48, 2): ["gemlite-int4-g16", "w4a16"]}
    names = [name for _, name in trial.jobs_of(plan)]
    assert names == ["humming-int4-g16", "gemlite-int4-g16", "bf16", "w4a16"]
