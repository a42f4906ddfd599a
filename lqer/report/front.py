"""The Pareto front of schemes: those that no other beats with as few bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Values are shown up to this many times the best: those of ruined models say nothing, and would squeeze all others
# together.
MOST_TIMES_BEST = 30.0


def pareto_front(bits: Sequence[float], values: Sequence[float], lower_is_better: bool = True) -> list[int]:
    """The places on the Pareto front, by increasing bits: no other place has at most the bits and a better value."""
    sign = 1 if lower_is_better else -1
    front: list[int] = []
    best = math.inf
    for i in sorted(range(len(bits)), key=lambda i: (bits[i], sign * values[i])):
        if sign * values[i] < best:
            front.append(i)
            best = sign * values[i]
    return front
