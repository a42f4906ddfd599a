"""Whether kernels are interpreted or compiled, programmatic dependent launch (PDL), and the size of the GPU.

With PDL a kernel may start before the previous kernel of its stream ends. It prefetches what does not depend on that
kernel, then waits for it on the device (gdc_wait).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

# True under TRITON_INTERPRET=1; read by host code and by kernels.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


def supports_pdl(x: Tensor) -> bool:
    """Whether kernels on x are launched with PDL, which needs compute capability 9.0."""
    return x.is_cuda and _capable(x.device)


@lru_cache
def _capable(device: torch.device) -> bool:
    return not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)


def is_hopper(x: Tensor) -> bool:
    """Whether kernels on x run on compute capability 9.0, the only one that has its tensor core instructions."""
    return x.is_cuda and not INTERPRETED and torch.cuda.get_device_capability(x.device) == (9, 0)


def launch_options(pdl: bool) -> dict[str, bool]:
    """Keyword arguments of a kernel launch."""
    return {"launch_pdl": True} if pdl else {}


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; one in the interpreter, which runs programs one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
