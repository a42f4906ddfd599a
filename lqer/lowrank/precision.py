"""The precision of float32 products, whatever the process chose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def full_float32() -> AbstractContextManager:
    """Compute float32 products without TF32 or bfloat16, on any device."""
    return _with_precision("highest")


def tensor_core_float32(device: torch.device) -> AbstractContextManager:
    """Compute float32 products on a GPU by its tensor cores, with factors of 11 significant bits (TF32)."""
    return _with_precision("high") if device.type == "cuda" else nullcontext()


@contextmanager
def _with_precision(precision: str) -> Iterator[None]:
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)
