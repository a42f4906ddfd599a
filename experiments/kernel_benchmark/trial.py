"""Every contender once in a process of its own, before anything is timed.

Kernels compile into caches on disk, several at once; and a contender that corrupts or hangs the GPU takes a trial
process with it instead of the table. A process logs each start and end; one that dies is started again behind the job
that killed it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from kernel_benchmark.results import Scene

Job = tuple[Scene, str]

LIMIT_SECONDS = 150.0
HANGING_SECONDS = 75.0  # a job that has run this long when time is up counts as hanging
# A trial of the widest weights takes some 6 GB: eight fit.
MOST_PROCESSES = 8
DIED = 3


def jobs_of(plan: dict[Scene, list[str]]) -> list[Job]:
    """All jobs; those that compile or tune for long first, so that they are spread over the processes."""
    jobs = [(scene, name) for scene, names in plan.items() for name in names]
    return sorted(jobs, key=lambda job: not job[1].startswith(("humming", "gemlite")))


def run_trials(jobs: Sequence[Job], command: Sequence[str], environment: dict[str, str]) -> dict[Job, str]:
    """Run all jobs in processes of `command` + [index, count, log file]; what went wrong, by job."""
    count = max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) // 2, len(jobs)))
    deadline = time.monotonic() + LIMIT_SECONDS
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{index}.jsonl") for index in range(count)]

        def start(index: int) -> subprocess.Popen:
            arguments = [*command, str(index), str(count), str(logs[index])]
            return subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        running = {index: start(index) for index in range(count)}
        begun = dict.fromkeys(running, 0)
        while running and time.monotonic() < deadline:
            time.sleep(0.2)
            for index, process in list(running.items()):
                if process.poll() is None:
                    continue
                before, begun[index] = begun[index], len(_started(logs[index]))
                # One that began no job did not die of a job: starting it again would not help.
                if process.returncode != 0 and before < begun[index] < len(jobs[index::count]):
                    running[index] = start(index)
                else:
                    del running[index]
        for process in running.values():
            process.kill()
            process.wait()
        problems: dict[Job, str] = {}
        for index, log in enumerate(logs):
            problems |= _problems(_entries(log), jobs[index::count], hanging=index in running, now=time.time())
        return problems


def run_worker(jobs: Sequence[Job], index: int, count: int, log: Path) -> int:
    """The trial process: the jobs of its share that no predecessor began. Exit status 3 after the GPU was lost."""
    import torch

    from kernel_benchmark.measure import describe, try_once

    mine = jobs[index::count]
    begun = _started(log)
    with log.open("a") as stream:

        def write(position: int, state: str, problem: str | None = None) -> None:
            entry = {"position": position, "state": state, "problem": problem, "time": time.time()}
            stream.write(json.dumps(entry) + "\n")
            stream.flush()

        for position, (scene, name) in enumerate(mine):
            if position in begun:
                continue
            write(position, "started")
            try:
                with torch.no_grad():
                    try_once(scene, name)
                write(position, "ended")
            except Exception as error:  # the log is for exactly this
                write(position, "ended", describe(error))
                try:
                    torch.cuda.empty_cache()
                    torch.cuda.synchronize()
                except Exception:
                    return DIED
    return 0


def worker_command(script: str, options: Sequence[str]) -> list[str]:
    """How `script` is called as a trial process; index, count and log follow."""
    return [sys.executable, script, *options, "--trial"]


def _entries(log: Path) -> list[dict]:
    if not log.exists():
        return []
    lines = log.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _started(log: Path) -> set[int]:
    return {entry["position"] for entry in _entries(log)}


def _problems(entries: Sequence[dict], jobs: Sequence[Job], hanging: bool, now: float) -> dict[Job, str]:
    """What one log says went wrong. A job cut short after less than HANGING_SECONDS is left for the table to try."""
    problems = {}
    started = {entry["position"]: entry["time"] for entry in entries if entry["state"] == "started"}
    ended = {entry["position"]: entry["problem"] for entry in entries if entry["state"] == "ended"}
    for position, job in enumerate(jobs):
        if position in ended:
            if ended[position] is not None:
                problems[job] = ended[position]
        elif position in started:
            seconds = now - started[position]
            is_last = position == max(started)
            if not (hanging and is_last):
                problems[job] = "its trial process died"
            elif seconds > HANGING_SECONDS:
                problems[job] = f"no result after {seconds:.0f} s in a process of its own"
    return problems
