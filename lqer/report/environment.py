"""The environment of a run: library versions, device name, peak memory."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import lqer
from lqer.results import Versions


def versions() -> Versions:
    """The versions of the interpreter and the libraries that numbers depend on, and the commit of lqer."""
    return Versions(
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=metadata.version("transformers"),
        triton=_version_or_none("triton"),
        lm_eval=_version_or_none("lm_eval") or "not installed",
        lqer=lqer.__version__,
        git=_git_commit(),
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or "x86_64 CPU, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"


def peak_memory_bytes(device: torch.device, all_gpus: bool = False) -> int:
    """Peak memory of this process: allocated on the GPU (summed over all GPUs if asked for), else resident."""
    if device.type == "cuda":
        gpus = range(torch.cuda.device_count()) if all_gpus else [device]
        return sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Peak resident memory since the process started."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss would do, but on Linux a process starts with that of the one it was forked from.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _version_or_none(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
