"""Programmatic dependent launch: a kernel starts while the one before it still runs, and waits for it on the device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .linear import INTERPRETED


def can_chain(x: Tensor) -> bool:
    """Whether a kernel may be launched while the one before it still runs (programmatic dependent launch)."""
    return x.is_cuda and _chains(x.device)


@lru_cache
def _chains(device: torch.device) -> bool:
    return not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(chained: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if chained else {}
