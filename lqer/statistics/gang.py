"""A gang: the processes (ranks) that work on one decoder block together; here the gang of one process.

Every rank does the same work on windows of its own. What all of them need is exchanged, and added up in the order of
the windows, so that the number of ranks does not show in any result. `lqer/stages/ranks.py` has the gang of several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Found = TypeVar("Found")


class Gang:
    """One process: all windows are its own, and there is nobody to exchange anything with."""

    rank = 0
    size = 1

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The neighbouring items that are for this rank. Those of all ranks, in their order, are all items."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]

    def deal(self, costs: Mapping[str, float]) -> set[str]:
        """Which of the named pieces of work are this rank's: the longest first, to whoever has the least to do."""
        load = [0.0] * self.size
        ours: set[str] = set()
        for name in sorted(costs, key=lambda name: -costs[name]):
            rank = load.index(min(load))
            load[rank] += costs[name]
            if rank == self.rank:
                ours.add(name)
        return ours

    def gathered(self, value: T) -> list[T]:
        """The value of every rank, in their order: a tensor or plain object, or dicts, lists and tuples of those."""
        return [value]

    def of_first(self, value: T) -> T:
        """The first rank's value."""
        return value

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in their order, in place of a tensor with at least one dimension."""
        return x

    def joined(self, x: Tensor) -> Tensor:
        """The rows of all ranks, in their order."""
        return x

    def each(self, items: Iterable[T], work: Callable[[T], Found]) -> Iterator[Found]:
        """work(item) for all items, in their order; each is done by one rank and given to all."""
        return map(work, items)

    def collect(
        self, items: Iterable[T], work: Callable[[T, Callable[..., None]], object], take: Callable[..., None]
    ) -> None:
        """work(item, found) for all items, which calls found(...) any number of times: take(...), in the same order.

        Nothing waits here to be taken, as it does between ranks.
        """
        for item in items:
            work(item, take)

    def add_gradients(
        self, items: Iterable[T], backward: Callable[[T], Tensor], leaves: Sequence[Tensor]
    ) -> list[Tensor]:
        """backward(item) for all items, which adds to `.grad` of the leaves: added up in the order of the items.

        Returns what `backward` returned, in their order.
        """
        return [backward(item) for item in items]


ALONE = Gang()


def add_up(parts: Sequence[Any]) -> Any:
    """The sum of numbers or tensors in the order given, which starts with the first part."""
    first, *others = parts
    for part in others:
        first = first + part
    return first


def largest(parts: Sequence[Tensor]) -> Tensor:
    """The largest of all parts, element by element."""
    return reduce(torch.maximum, parts)
