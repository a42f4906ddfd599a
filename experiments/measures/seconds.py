"""Seconds of work on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def least_seconds(work: Callable[[], Result], repeats: int, device: torch.device) -> tuple[float, Result]:
    """The least time of the repeats, after a run that compiles and is not counted, and the last result."""
    seconds = []
    for _ in range(1 + repeats):
        _wait_for(device)
        started = time.perf_counter()
        result = work()
        _wait_for(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:]), result


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
