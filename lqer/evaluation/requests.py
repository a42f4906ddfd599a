"""Requests of lm-evaluation-harness in units that can be scored apart, with the scores of one call.

The library sorts requests by length, gives one row of a batch to all that share a context, and cuts batches of this
order. A unit is a run of such batches, so that a request has the same neighbours, the same padding and the same score
whoever scores its unit.

Shapes: N requests of a unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Enough that the start of a unit does not count, and that a task has many of them.
BATCHES_OF_A_UNIT = 16

# (context, continuation) as text, and the tokens of both.
Request = tuple[tuple[str, str], list[int], list[int]]
Score = tuple[float, bool]


def unit_name(call: int, unit: int) -> str:
    """The name of a unit of the `call`-th list of requests that an evaluation scores."""
    return f"{call}-{unit:05d}"


def request_units(requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """The places of the requests of each unit; the longest ones are in the first."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for place, (_, context, continuation) in enumerate(requests):
        rows.setdefault((*context, *continuation[:-1]), []).append(place)

    def order(row: list[int]) -> tuple[int, list[int]]:
        _, context, continuation = requests[max(row, key=lambda place: len(requests[place][2]))]
        tokens = context + continuation
        return -len(tokens), tokens

    ordered, size = sorted(rows.values(), key=order), batch_size * BATCHES_OF_A_UNIT
    return [[place for row in ordered[start : start + size] for place in row] for start in range(0, len(ordered), size)]


@dataclass(frozen=True)
class Share:
    """Units that one of `count` processes scores: every `count`-th, from the `index`-th on, so that lengths mix."""

    index: int
    count: int

    def __contains__(self, unit: int) -> bool:
        return unit % self.count == self.index


@dataclass
class Scores:
    """Scores of units by name. share: the units to score; None: all. Units that are there are not scored again."""

    share: Share | None = None
    found: dict[str, list[Score]] = field(default_factory=dict)

    def wants(self, name: str, unit: int) -> bool:
        return name not in self.found and (self.share is None or unit in self.share)

    def tensors(self) -> dict[str, Tensor]:
        """The scores by unit, float64 (N, 2): the log-likelihood, and 1 where the continuation is the likeliest."""
        return {name: torch.tensor(scores, dtype=torch.float64) for name, scores in self.found.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Scores:
        """The scores that `tensors` gave."""
        return cls(None, {name: [(x, bool(y)) for x, y in scores_N2.tolist()] for name, scores_N2 in tensors.items()})
