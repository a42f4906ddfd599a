"""Width allocation: which of several number formats every linear gets under a budget of bits.

    minimise Σ_l Δ_l(f_l)    subject to    Σ_l b_l(f_l) ≤ B

Δ_l(f) is what format f in linear l adds to the model's loss, b_l(f) its bits. Every linear begins with its cheapest
format; the step with the largest gain per bit, (Δ_l(f) − Δ_l(f')) / (b_l(f') − b_l(f)), comes first, as long as bits
are left. That is the optimum of the Lagrangian Σ Δ + λ Σ b for some λ, up to the last few steps that do not fit. Every
uniform width within the budget, filled up in the same way, is a candidate too: the result is never worse than one.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """Bits and added losses of one linear, or of several that share a format, in the order of the formats."""

    bits: tuple[int, ...]
    losses: tuple[float, ...]

    @property
    def cheapest(self) -> int:
        return min(range(len(self.bits)), key=lambda i: (self.bits[i], self.losses[i]))

    def step(self, chosen: int, left: int | None = None) -> tuple[float, int] | None:
        """(gain per bit, format) of the best step up from a format, of those that cost at most `left` bits."""
        steps = []
        for i, (bits, loss) in enumerate(zip(self.bits, self.losses, strict=True)):
            cost, gain = bits - self.bits[chosen], self.losses[chosen] - loss
            if cost > 0 and gain > 0 and (left is None or cost <= left):
                steps.append((gain / cost, i))
        return max(steps, default=None)


@dataclass(frozen=True)
class Allocation:
    """The format of every curve, by index, with the bits and the loss of all; the same for the best uniform format.

    uniform: None where no format fits the budget in every linear.
    """

    chosen: dict[str, int]
    bits: int
    loss: float
    uniform: int | None
    uniform_bits: int
    uniform_loss: float


def joined(curves: list[Curve]) -> Curve:
    """The curve of linears that share a format."""
    bits = zip(*(curve.bits for curve in curves), strict=True)
    losses = zip(*(curve.losses for curve in curves), strict=True)
    return Curve(tuple(map(sum, bits)), tuple(map(sum, losses)))


def allocate_widths(curves: Mapping[str, Curve], budget: int) -> Allocation:
    """The formats with the least loss within `budget` bits.

    All curves have the same formats. Raises ValueError where the cheapest of all do not fit.
    """
    cheapest = {name: curve.cheapest for name, curve in curves.items()}
    if (least := _bits(curves, cheapest)) > budget:
        raise ValueError(f"the cheapest formats take {least} bits, more than the {budget} of the budget")
    formats = range(len(next(iter(curves.values())).bits)) if curves else range(0)
    same = {i: dict.fromkeys(curves, i) for i in formats}
    fitting = [i for i, chosen in same.items() if _bits(curves, chosen) <= budget]
    uniform = min(fitting, key=lambda i: _loss(curves, same[i])) if fitting else None
    starts = [cheapest, *(same[i] for i in fitting)]
    best = min((_filled(curves, start, budget) for start in starts), key=lambda chosen: _loss(curves, chosen))
    one = cheapest if uniform is None else same[uniform]
    return Allocation(best, _bits(curves, best), _loss(curves, best), uniform, _bits(curves, one), _loss(curves, one))


def _filled(curves: Mapping[str, Curve], start: Mapping[str, int], budget: int) -> dict[str, int]:
    """Take steps, the largest gain per bit first, until none fits."""
    chosen, left = dict(start), budget - _bits(curves, start)
    queue: list[tuple[float, int, str, int]] = []

    def push(order: int, name: str, most: int | None = None) -> None:
        if (step := curves[name].step(chosen[name], most)) is not None:
            heapq.heappush(queue, (-step[0], order, name, step[1]))

    for order, name in enumerate(curves):
        push(order, name)
    while queue:
        _, order, name, to = heapq.heappop(queue)
        bits = curves[name].bits[to] - curves[name].bits[chosen[name]]
        if bits > left:
            push(order, name, left)
            continue
        chosen[name] = to
        left -= bits
        push(order, name)
    return chosen


def _bits(curves: Mapping[str, Curve], chosen: Mapping[str, int]) -> int:
    return sum(curves[name].bits[i] for name, i in chosen.items())


def _loss(curves: Mapping[str, Curve], chosen: Mapping[str, int]) -> float:
    return sum(curves[name].losses[i] for name, i in chosen.items())
