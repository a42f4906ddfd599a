"""Batches of sequences to train a decoder block on, handed to a GPU without waiting for it.

Shapes: S sequences, T tokens, D hidden size, B sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Of the sequences of one batch, int64 (B,), one tensor for each of several states, on the device of that state.
Numbers = tuple[Tensor, ...]


def numbers_of(states: Sequence[Tensor], chosen: Sequence[Tensor]) -> list[Numbers]:
    """The sequence numbers of every batch, int64 (B,), where each of the states (S, T, D) is.

    They are copied once, before the first batch: each copy waits for a GPU.
    """
    sizes, all_chosen = [len(chosen_B) for chosen_B in chosen], torch.cat([*chosen])
    numbers = [all_chosen.to(states_STD.device).split(sizes) for states_STD in states]
    return [*zip(*numbers, strict=True)]


def batch_of(states: Sequence[Tensor], numbers: Numbers, device: torch.device) -> list[Tensor]:
    """The sequences (B, T, D) of all states (S, T, D) that have these numbers, on a device."""
    return [_moved(states_STD[numbers_B], device) for states_STD, numbers_B in zip(states, numbers, strict=True)]


def _moved(x: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and not x.is_cuda:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def back_through(made: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> None:
    """Go on backward from weights that were made for a step, once, with the gradients that their leaves have."""
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    torch.autograd.backward([made[name] for name in gradients], [*gradients.values()])


def trained_dtype(device: torch.device, autocast: torch.dtype | None) -> torch.dtype:
    """Of a weight that is made anew for every step: on a GPU what autocast would convert it to, else float32."""
    return autocast if autocast is not None and device.type == "cuda" else torch.float32
