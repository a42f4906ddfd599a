"""Memory that is not written shows."""

from __future__ import annotations

import pytest
import torch
from kernel_layers import DEVICE


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """What the allocator hands out next holds NaN: an output that is not written shows."""
    for elements in (1 << 8, 1 << 12, 1 << 16):
        poisoned = [torch.full((elements,), torch.nan, device=DEVICE) for _ in range(4)]
        poisoned.clear()
