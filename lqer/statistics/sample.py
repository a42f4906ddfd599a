"""Inputs of a few tokens, spread evenly over the calibration text: output errors are reported on them.

Shapes: I in_features, N tokens of a batch, S sampled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lqer.statistics.base import Allocator, Statistic
from lqer.statistics.gang import Gang


class SampleAccumulator:
    """The sampled rows of every batch, where the inputs are: a copy to the CPU would wait for a GPU."""

    def __init__(self) -> None:
        self._rows_SI: list[Tensor] = []

    def add(self, x_NI: Tensor, original_NI: Tensor | None, sampled_N: Tensor, weights_N: Tensor | None = None) -> None:
        self._rows_SI.append(x_NI[sampled_N])

    def join(self, gang: Gang) -> None:
        self._rows_SI = [rows_SI for of_rank in gang.gathered(self._rows_SI) for rows_SI in of_rank]

    def result(self) -> Tensor:
        return torch.cat(self._rows_SI)


@dataclass(frozen=True)
class Sample(Statistic):
    """The inputs of the sampled tokens, (S, I) in the model's dtype."""

    kind = "sample"

    def accumulator(self, in_features: int, device: torch.device, offload: Allocator) -> SampleAccumulator:
        return SampleAccumulator()

    def nbytes(self, in_features: int) -> int:
        return 0


def spread_indices(
    first_token: int, count: int, tokens: int, sampled: int, device: torch.device | None = None
) -> Tensor:
    """Which of the `count` tokens from first_token on are among the `sampled` ones spread evenly over all `tokens`.

    The choice depends only on a token's position in the whole text, so it is the same for every batch size. Indices are
    made on the device, since a copy would wait for a GPU.
    """
    sampled = min(sampled, tokens)
    # The sampled token i, at floor(i tokens / sampled), is at p or behind it from i = ceil(p sampled / tokens) on.
    begin, end = (-(-position * sampled // tokens) for position in (first_token, first_token + count))
    return torch.arange(begin, end, device=device) * tokens // sampled - first_token


def evenly_spread(sampled: int, tokens: int, device: torch.device | None = None) -> Tensor:
    """The indices of `sampled` tokens spread evenly over all `tokens`; made on the device, as by `spread_indices`."""
    return torch.arange(sampled, device=device) * tokens // sampled
