"""How kernels run here: in Triton's interpreter or compiled, and by programmatic dependent launch (PDL) or not."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

# True under TRITON_INTERPRET=1; read by host code and by kernels.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


def can_chain(x: Tensor) -> bool:
    """Whether a kernel on x may start before the previous kernel has ended (PDL: compute capability 9.0 and later)."""
    return x.is_cuda and _chains(x.device)


@lru_cache
def _chains(device: torch.device) -> bool:
    return not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(chained: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if chained else {}
