"""Every contender once in a separate process, before anything is timed.

Several processes compile kernels into caches on disk at once, and a contender that corrupts or hangs the GPU kills its
trial process instead of the benchmark. A process writes a line to its log when a job starts and when it ends.
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
# A trial of the widest weights needs about 6 GB of GPU memory: eight fit.
MOST_PROCESSES = 8
GPU_LOST = 3


def jobs_of(plan: dict[Scene, list[str]]) -> list[Job]:
    """All jobs; those that compile or tune for long come first, so that they are spread over the processes."""
    jobs = [(scene, name) for scene, names in plan.items() for name in names]
    return sorted(jobs, key=lambda job: not job[1].startswith(("humming", "gemlite")))


def run_trials(jobs: Sequence[Job], command: Sequence[str], limit_seconds: float = LIMIT_SECONDS) -> dict[Job, str]:
    """Run `command` + [index, count, log file] for every process; error messages by job. Untried jobs have none."""
    count = max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) // 2, len(jobs)))
    deadline = time.monotonic() + limit_seconds
    failed: dict[Job, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{index}.jsonl") for index in range(count)]
        processes = []
        for index, log in enumerate(logs):
            log.touch()
            arguments = [*command, str(index), str(count), str(log)]
            processes.append(subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        for index, (process, log) in enumerate(zip(processes, logs, strict=True)):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
                reason = "its trial process died"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                reason = f"no result after {limit_seconds:.0f} s of trials"
            failed |= problems(log.read_text(), jobs[index::count], reason)
    return failed


def problems(log: str, jobs: Sequence[Job], reason: str) -> dict[Job, str]:
    """Error messages by job from the text of a log; `reason` for a job that started and did not end."""
    messages: dict[int, str | None] = {}
    for line in log.splitlines(keepends=True):
        if line.endswith("\n"):
            entry = json.loads(line)
            messages[entry["position"]] = entry["problem"] if entry["ended"] else reason
    return {jobs[position]: message for position, message in messages.items() if message is not None}


def run_worker(jobs: Sequence[Job], index: int, count: int, log: Path) -> int:
    """A trial process: every count-th job from `index` on. Exit status GPU_LOST if the GPU no longer responds."""
    import torch

    from kernel_benchmark.measure import describe, try_once

    def write(position: int, ended: bool, problem: str | None = None) -> None:
        with log.open("a") as stream:
            stream.write(json.dumps({"position": position, "ended": ended, "problem": problem}) + "\n")

    for position, (scene, name) in enumerate(jobs[index::count]):
        write(position, ended=False)
        try:
            with torch.no_grad():
                try_once(scene, name)
            write(position, ended=True)
        except Exception as error:  # reported, whatever it is
            write(position, ended=True, problem=describe(error))
            try:
                torch.cuda.empty_cache()
                torch.cuda.synchronize()
            except Exception:
                return GPU_LOST
    return 0


def worker_command(script: str, options: Sequence[str]) -> list[str]:
    """The command of a trial process, without index, count and log file."""
    return [sys.executable, script, *options, "--trial"]
