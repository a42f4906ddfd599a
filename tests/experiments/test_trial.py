"""Trial processes: error messages, deaths, time limits. The processes are small scripts; no GPU is involved."""

from __future__ import annotations

import os
import sys

import pytest
from kernel_benchmark import measure, trial
from kernel_benchmark.results import Scene

JOBS = [(Scene(64, 48, 1), name) for name in ("fine", "absent", "deadly", "late")]

# Writes the log of run_worker; outcomes stand for jobs that end, fail, kill their process or hang.
WORKER = """
import json, os, signal, sys
def write(**entry):
    with open(sys.argv[3], "a") as stream:
        print(json.dumps(entry), file=stream)
for position, outcome in enumerate(OUTCOMES):
    write(position=position, ended=False, problem=None)
    if outcome == "die":
        os._exit(9)
    if outcome == "hang":
        signal.pause()
    write(position=position, ended=True, problem=outcome)
"""


@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


def trials(tmp_path, outcomes, **limit) -> dict:
    script = tmp_path / "worker.py"
    script.write_text(f"OUTCOMES = {outcomes!r}\n{WORKER}")
    return trial.run_trials(JOBS, [sys.executable, str(script)], **limit)


def test_a_dead_process_is_a_problem_of_the_job_that_it_was_running(tmp_path, one_process):
    found = trials(tmp_path, [None, "not installed: peer", "die", None])
    assert found == {JOBS[1]: "not installed: peer", JOBS[2]: "its trial process died"}


def test_a_hanging_process_is_killed_at_the_time_limit(tmp_path, one_process):
    found = trials(tmp_path, ["hang"], limit_seconds=0.0)
    assert found in ({}, {JOBS[0]: "no result after 0 s of trials"})


def test_jobs_of_a_process_that_cannot_start_have_no_problem(tmp_path, one_process):
    assert trial.run_trials(JOBS, [sys.executable, str(tmp_path / "absent.py")]) == {}


def test_a_line_that_was_cut_off_is_ignored():
    log = '{"position": 0, "ended": false, "problem": null}\n{"position": 0, "ended": tr'
    assert trial.problems(log, JOBS, "died") == {JOBS[0]: "died"}


def test_a_worker_tries_every_second_job_of_two(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(measure, "try_once", lambda scene, name: tried.append(name))
    assert trial.run_worker(JOBS, 0, 2, tmp_path / "log") == 0
    assert tried == ["fine", "deadly"]


def test_a_worker_reports_an_error_and_exits_if_the_gpu_is_lost(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(measure, "try_once", fails)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr("torch.cuda.synchronize", fails)
    log = tmp_path / "log"
    assert trial.run_worker(JOBS, 0, 1, log) == trial.GPU_LOST
    found = trial.problems(log.read_text(), JOBS, "died")
    assert found == {JOBS[0]: "RuntimeError: an illegal memory access was encountered"}


def test_jobs_that_compile_longest_come_first():
    plan = {Scene(64, 48, 1): ["bf16", "humming-int4-g16"], Scene(64, 48, 2): ["gemlite-int4-g16", "w4a16"]}
    names = [name for _, name in trial.jobs_of(plan)]
    assert names == ["humming-int4-g16", "gemlite-int4-g16", "bf16", "w4a16"]
