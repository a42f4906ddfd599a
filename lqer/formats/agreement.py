"""Kernels that stand in for plain PyTorch are compared with it once, on the GPU that they run on.

Another version of Triton, or another card, can break a kernel without an error. One that disagrees is not used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

log = logging.getLogger(__name__)
_agreed: dict[Hashable, bool] = {}


def agrees(kind: Hashable, kernel: Callable[[], Tensor], torch_s: Callable[[], Tensor], most_error: float) -> bool:
    """Whether a kernel and PyTorch computed the same, to `most_error` of the norm, when a kind was first asked for.

    kind: all that decides which code runs. False where nothing may run beside a model: in a CUDA graph that is being
    recorded, or in code that is being compiled, unless the kind is known.
    """
    if kind not in _agreed:
        recording = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if recording or torch.compiler.is_compiling():
            return False
        expected = torch_s().double()
        error = float((kernel().double() - expected).norm() / expected.norm().clamp_min(1e-30))
        _agreed[kind] = error <= most_error
        if not _agreed[kind]:
            log.warning("the kernel of %s differs from PyTorch by %.2g of the norm: PyTorch is used", kind, error)
    return _agreed[kind]
