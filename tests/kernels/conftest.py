"""Fresh memory holds NaN, so that an output that is not written fails the test."""

from __future__ import annotations

import pytest
import torch
from kernel_layers import DEVICE


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Make the allocator return memory that holds NaN."""
    for elements in (1 << 8, 1 << 12, 1 << 16):
        poisoned = [torch.full((elements,), torch.nan, device=DEVICE) for _ in range(4)]
        poisoned.clear()
