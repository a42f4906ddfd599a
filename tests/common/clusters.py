"""A cluster of this machine, for tests of runs on one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from holding import is_held, let_go

from lqer.config import Config, read_config

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")

ENVIRONMENT = {
    "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"
}  # fmt: skip


@contextmanager
def two_cpus() -> Iterator[str]:
    """The address of a cluster of two CPUs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", "--num-cpus=2", "--block",
        "--include-dashboard=false", "--object-store-memory=100000000", "--disable-usage-stats",
    ]  # fmt: skip
    head = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert head.stdout is not None
        for line in head.stdout:
            if b"runtime started" in line:
                break
        yield f"127.0.0.1:{port}"
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(60)


def config_of(experiment: Any, output: str, address: str | None, *overrides: str) -> Config:
    """Of a run whose output_dir is that folder of an experiment, on a cluster if there is an address."""
    there = [f"--cluster.address={address}", "--cluster.cpus_per_job=1"] if address else []
    return read_config(
        experiment.config, "run", [f"--output_dir={experiment.folder / output}", *there, "--device=cpu", *overrides]
    )


def the_worker(worker: psutil.Process) -> list[psutil.Process]:
    return [worker]


def ranks_of(worker: psutil.Process) -> list[psutil.Process]:
    """The other processes of its gang, which its server of processes has started."""
    return [child for child in worker.children(recursive=True) if child.ppid() != worker.pid]


def kill_workers(
    folder: Path, *stages: str, victims: Callable[[psutil.Process], list[psutil.Process]] = the_worker
) -> threading.Thread:
    """Kill every worker that is busy each time that one is held in a stage (`holding`); at first the keeper too.

    victims: of a worker, who is killed.
    """

    def work() -> None:
        left = list(stages)
        while left:
            for stage in [stage for stage in left if is_held(folder, stage)]:
                # Who was held may have been killed for another stage: then nobody is busy between two jobs.
                while not _kill("ray::Worker.work", victims):
                    time.sleep(0.005)
                if len(left) == len(stages):
                    _kill("ray::Keeper", the_worker)
                let_go(folder, stage)
                left.remove(stage)
            time.sleep(0.02)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def _kill(name: str, victims: Callable[[psutil.Process], list[psutil.Process]]) -> int:
    """How many were killed, of the processes of that name; of this test alone: this process has started the cluster."""
    killed = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if (process.cmdline() or [""])[0].startswith(name):
                for victim in victims(process):
                    victim.kill()
                    killed += 1
    return killed
