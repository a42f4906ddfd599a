"""Rank allocation: which rank every linear gets under a budget of bits.

Raising a linear's rank from r to r' removes Σ_{r < i <= r'} σ_i² from its error's energy and costs the bits of r' − r
more columns of A and rows of B. Ranks grow in steps of the factors' block size; the step with the largest gain per bit
comes first, as long as bits are left. Within a linear the gains of equal steps fall, so this greedy allocation is
optimal up to the last few steps that do not fit. The other candidate is the largest uniform rank within the budget,
filled up in the same way: the result is never worse than a uniform rank.

Shapes: K = min(I, O) of a linear.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lqer.formats import NumberFormat

# The formats of A and of B.
Formats = tuple[NumberFormat, NumberFormat]

# The step of ranks whose factors have no groups along the rank: the width of a tensor core's operand.
UNBLOCKED_STEP = 8


@dataclass(frozen=True)
class Candidate:
    """One linear whose rank is to be chosen.

    energies_K: float64, descending, by how much each further rank lowers the objective. step: ranks are multiples of
    it. bits: the bits of A and B as a function of the rank.
    """

    energies_K: Tensor
    step: int
    bits: Callable[[int], int]

    @property
    def most(self) -> int:
        """The largest rank that is a multiple of the step."""
        return len(self.energies_K) // self.step * self.step

    def left(self, rank: int) -> float:
        """The linear's term of the objective at a rank."""
        return float(self.energies_K[rank:].sum())


@dataclass(frozen=True)
class Allocation:
    """Ranks by linear, their bits and objective; the same for the largest uniform rank within the budget."""

    ranks: dict[str, int]
    bits: int
    objective: float
    uniform_rank: int
    uniform_bits: int
    uniform_objective: float


def rank_step(factors: Formats) -> int:
    """Ranks are multiples of the block sizes of A's and B's formats."""
    return math.lcm(*(size if isinstance(size, int) else UNBLOCKED_STEP for size in (f.block_size for f in factors)))


def factor_bits(factors: Formats, axes: tuple[int, int], in_features: int, out_features: int, rank: int) -> int:
    """The bits of a_IR and b_RO as stored, in their formats, with blocks along `axes`."""
    if rank == 0:
        return 0
    a_format, b_format = factors
    a_bits = rank * row_bits(a_format, in_features) if axes[0] == 0 else in_features * row_bits(a_format, rank)
    b_bits = out_features * row_bits(b_format, rank) if axes[1] == 0 else rank * row_bits(b_format, out_features)
    return a_bits + b_bits


@lru_cache(maxsize=4096)
def row_bits(number_format: NumberFormat, length: int) -> int:
    """The bits of one row of that length along the groups; every row is packed separately."""
    row = number_format.quantize(torch.zeros(1, length))
    return row.code_bits + row.metadata_bits


def allocate(candidates: Mapping[str, Candidate], budget: int) -> Allocation:
    """Choose the ranks that minimise the objective, Σ over linears of the remaining energy, within `budget` bits.

    The ranks are maximal: no further step of any linear fits into the remaining bits.
    """
    uniform_rank, uniform = _largest_uniform(candidates, budget)
    allocations = [_filled(candidates, ranks, budget) for ranks in (dict.fromkeys(candidates, 0), uniform)]
    best = min(allocations, key=lambda ranks: _objective(candidates, ranks))
    return Allocation(
        ranks=best,
        bits=_bits(candidates, best),
        objective=_objective(candidates, best),
        uniform_rank=uniform_rank,
        uniform_bits=_bits(candidates, uniform),
        uniform_objective=_objective(candidates, uniform),
    )


def _filled(candidates: Mapping[str, Candidate], ranks: Mapping[str, int], budget: int) -> dict[str, int]:
    """Raise ranks step by step, the largest gain per bit first, until no step fits."""
    ranks, left = dict(ranks), budget - _bits(candidates, ranks)
    queue = [
        entry for i, name in enumerate(candidates) if (entry := _next_step(candidates[name], ranks[name], i, name))
    ]
    heapq.heapify(queue)
    while queue:
        _, order, name, bits = heapq.heappop(queue)
        if bits > left:
            continue
        ranks[name] += candidates[name].step
        left -= bits
        if entry := _next_step(candidates[name], ranks[name], order, name):
            heapq.heappush(queue, entry)
    return ranks


def _next_step(candidate: Candidate, rank: int, order: int, name: str) -> tuple[float, int, str, int] | None:
    """(−gain per bit, order among equals, name, bits) of the linear's next step; None at its full rank."""
    if rank >= candidate.most:
        return None
    bits = candidate.bits(rank + candidate.step) - candidate.bits(rank)
    gain = float(candidate.energies_K[rank : rank + candidate.step].sum())
    return -gain / bits, order, name, bits


def _largest_uniform(candidates: Mapping[str, Candidate], budget: int) -> tuple[int, dict[str, int]]:
    """The largest rank that all linears can have, each up to its own full rank and in its own steps."""
    step = max((candidate.step for candidate in candidates.values()), default=1)
    most = max((candidate.most for candidate in candidates.values()), default=0)
    best, chosen = 0, dict.fromkeys(candidates, 0)
    for rank in range(step, most + step, step):
        ranks = {name: min(rank // c.step * c.step, c.most) for name, c in candidates.items()}
        if _bits(candidates, ranks) > budget:
            break
        best, chosen = rank, ranks
    return best, chosen


def _bits(candidates: Mapping[str, Candidate], ranks: Mapping[str, int]) -> int:
    return sum(candidates[name].bits(rank) for name, rank in ranks.items())


def _objective(candidates: Mapping[str, Candidate], ranks: Mapping[str, int]) -> float:
    return sum(candidates[name].left(rank) for name, rank in ranks.items())
