"""The schedule of progressive adaptive rounding: the fraction still undecided in each round, and the training batches.

The long schedule is that of two to four bits, the short one that of six and eight (TesseraQ, arXiv 2410.19103).
"""

from __future__ import annotations

import torch
from torch import Tensor

SOFT_FRACTIONS_20 = (
    0.80, 0.65, 0.50, 0.43, 0.38, 0.34, 0.30, 0.27, 0.24, 0.21,
    0.18, 0.15, 0.12, 0.10, 0.08, 0.06, 0.04, 0.02, 0.01, 0.005,
)  # fmt: skip
SOFT_FRACTIONS_10 = (0.75, 0.5, 0.375, 0.25, 0.125, 0.09, 0.06, 0.04, 0.02, 0.005)
MOST_BITS_OF_LONG_SCHEDULE = 4


def soft_fractions(bits: int) -> tuple[float, ...]:
    """The published schedule for weights of that many bits."""
    return SOFT_FRACTIONS_20 if bits <= MOST_BITS_OF_LONG_SCHEDULE else SOFT_FRACTIONS_10


def draw_batches(sequences: int, rounds: int, steps: int, batch_size: int, seed: int) -> Tensor:
    """The sequences that every step of every round trains on: int64 (rounds, steps, batch), without repeats in a step.

    All of them are drawn at once, so that a run resumed in round t trains on the same batches.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rounds, steps, sequences, generator=generator)
    return scores.argsort(dim=-1)[..., : min(batch_size, sequences)].clone()
