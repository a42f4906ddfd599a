"""What this machine has: memory and disk, as this process may use them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil
import torch

# Which control groups (containers, SLURM jobs) this process is in, and where the kernel shows them.
OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """Bytes of RAM, of GPU memory (None if the run is on the CPU), and free on the disk of the store.

    resident: bytes of RAM that this process holds already. card_share: the share of the GPU's memory that `device` is.
    """

    ram: int
    device: int | None
    disk: int
    resident: int
    card_share: float = 1.0


def read_machine(device: torch.device, folder: Path, card_share: float = 1.0) -> Machine:
    """The machine as this process sees it, and of a GPU that share; `folder` need not exist yet."""
    gpu = gpu_bytes(device)
    share = None if gpu is None else int(card_share * gpu)
    return Machine(usable_ram(), share, free_disk(folder), resident_bytes(), card_share)


def gpu_bytes(device: torch.device) -> int | None:
    """The memory of a GPU; None for another device."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def resident_bytes() -> int:
    """Resident memory of this process, mapped pages of files included."""
    return psutil.Process().memory_info().rss


def usable_ram() -> int:
    """The machine's RAM, or what its control group lets this process have of it."""
    limits = [psutil.virtual_memory().total]
    for file in _limit_files():
        try:
            limits.append(int(file.read_text(encoding="ascii")))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return min(limits)


def _limit_files() -> Iterator[Path]:
    """The files that limit the memory of this process: of its own control group and of every group around it.

    A line of /proc/self/cgroup is "0::/path" in version 2 and "id:controllers:/path" in version 1. Inside a container
    the path may be that of the host: the groups that are not there are skipped, the root always counts.
    """
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in ["0::/", "0:memory:/", *lines]:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (CGROUPS, "memory.max")
        group = PurePosixPath(path.lstrip("/"))
        for folder in (group, *group.parents):
            yield root / folder / name


def free_disk(folder: Path) -> int:
    """Bytes free for this user under the folder, or under the nearest one above it that exists."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return psutil.disk_usage(os.fspath(existing)).free
