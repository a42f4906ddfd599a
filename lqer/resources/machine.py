"""What this machine has and how fast it is: the facts that an estimate is held against."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch

# Where control groups (containers, SLURM jobs) say what a process may have: version 2, version 1.
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# A rate is that of the fastest of a few products of this many rows, large enough to keep the device busy.
REPEATS = 3
PRODUCT_ROWS = {"cpu": 1024, "cuda": 8192}
COPIED_BYTES = {"cpu": 1 << 26, "cuda": 1 << 29}
CALLS = 1000


@dataclass(frozen=True)
class Rates:
    """Per second: operations of a square matrix product in the run's dtype, bytes that a copy reads and writes, calls
    from Python of an operation on a few numbers.
    """

    flops: float
    bytes: float
    calls: float


@dataclass(frozen=True)
class Machine:
    """Bytes: of RAM, of the GPU's memory (None where the run is on the CPU), free on the disk of the store.

    resident: what this process holds already. gpus: how many there are.
    """

    ram: int
    device: int | None
    disk: int
    resident: int
    gpus: int
    rates: Rates


def read_machine(device: torch.device, dtype: torch.dtype, folder: Path) -> Machine:
    """The machine as this process sees it; `folder` may not exist yet."""
    gpu = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return Machine(
        ram=usable_ram(),
        device=gpu,
        disk=free_disk(folder),
        resident=resident_bytes(),
        gpus=torch.cuda.device_count(),
        rates=measure_rates(device, dtype),
    )


def resident_bytes() -> int:
    """What this process holds now, pages of files included."""
    return psutil.Process().memory_info().rss


def usable_ram() -> int:
    """The machine's RAM, or what its control group lets this process have of it."""
    limits = [psutil.virtual_memory().total]
    for name in CGROUP_LIMITS:
        try:
            limits.append(int(Path(name).read_text(encoding="ascii")))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(limits)


def free_disk(folder: Path) -> int:
    """Bytes free for this user under the folder, or under the nearest one above it that exists."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return psutil.disk_usage(os.fspath(existing)).free


@cache
def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """How fast the device multiplies, copies and is called just now; takes a fraction of a second, once per process."""
    rows = PRODUCT_ROWS[device.type]
    matrix = torch.ones(rows, rows, dtype=dtype, device=device)
    source = torch.ones(COPIED_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    few = torch.ones(64, 64, device=device)
    return Rates(
        flops=2 * rows**3 / _fastest(lambda: torch.mm(matrix, matrix), device),
        bytes=2 * source.nbytes / _fastest(lambda: target.copy_(source), device),
        calls=CALLS / _fastest(lambda: [few.mul(2.0) for _ in range(CALLS)], device),
    )


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few calls, after one to warm up."""
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
