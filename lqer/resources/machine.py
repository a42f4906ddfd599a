"""What this machine has: memory and disk, as this process may use them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

# Where control groups (containers, SLURM jobs) state the memory limit of a process: version 2, version 1.
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Machine:
    """Bytes of RAM, of GPU memory (None if the run is on the CPU), and free on the disk of the store.

    resident: bytes of RAM that this process holds already.
    """

    ram: int
    device: int | None
    disk: int
    resident: int


def read_machine(device: torch.device, folder: Path) -> Machine:
    """The machine as this process sees it; `folder` need not exist yet."""
    gpu = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return Machine(ram=usable_ram(), device=gpu, disk=free_disk(folder), resident=resident_bytes())


def resident_bytes() -> int:
    """Resident memory of this process, mapped pages of files included."""
    return psutil.Process().memory_info().rss


def usable_ram() -> int:
    """The machine's RAM, or what its control group lets this process have of it."""
    limits = [psutil.virtual_memory().total]
    for name in CGROUP_LIMITS:
        try:
            limits.append(int(Path(name).read_text(encoding="ascii")))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return min(limits)


def free_disk(folder: Path) -> int:
    """Bytes free for this user under the folder, or under the nearest one above it that exists."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return psutil.disk_usage(os.fspath(existing)).free
