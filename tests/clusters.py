"""A cluster of this machine, for tests of runs on one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest

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
