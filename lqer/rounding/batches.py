"""Batches of sequences to train a decoder block on, handed to a GPU without waiting for it.

Shapes: S sequences, T tokens, D hidden size, B sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def batches_of(states: Sequence[Tensor], chosen: Sequence[Tensor], device: torch.device) -> Iterator[list[Tensor]]:
    """For every batch of sequence numbers, int64 (B,), those sequences (B, T, D) of all states (S, T, D), on a device.

    The numbers are copied to where the states are once, before the first batch: each copy waits for a GPU.
    """
    sizes, all_chosen = [len(chosen_B) for chosen_B in chosen], torch.cat([*chosen])
    numbers = [all_chosen.to(states_STD.device).split(sizes) for states_STD in states]
    for numbers_of_batch in zip(*numbers, strict=True):
        yield [
            _moved(states_STD[chosen_B], device)
            for states_STD, chosen_B in zip(states, numbers_of_batch, strict=True)
        ]  # fmt: skip


def _moved(x: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and not x.is_cuda:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def trained_dtype(device: torch.device, autocast: torch.dtype | None) -> torch.dtype:
    """Of a weight that is made anew for every step: on a GPU what autocast would convert it to, else float32."""
    return autocast if autocast is not None and device.type == "cuda" else torch.float32
