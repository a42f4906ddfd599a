"""The exchange between the ranks of a gang: torch.distributed, with gloo for the CPU and NCCL between GPUs.

What a rank gives to the others is broadcast to all of them, and every rank adds up what it has received in the same
order. An `all_reduce` would add in an order that depends on the number of ranks. Ranks that share a GPU exchange
through the CPU, since NCCL refuses them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lqer.phases import in_phase
from lqer.statistics import Gang
from lqer.statistics.gang import add_up
from lqer.statistics.symmetric import panels

T = TypeVar("T")
Found = TypeVar("Found")

# A rank may wait for another that works on the longest linear of a block. One that died closes its connection.
LONGEST_WAIT = timedelta(days=1)
# Between GPUs, after all ranks have announced what they exchange: only what the GPU has yet to do comes in between.
LONGEST_WAIT_NCCL = timedelta(minutes=10)


class LostRankError(Exception):
    """Another rank has ended."""


@dataclass(frozen=True)
class _Described:
    """A tensor that follows."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_cuda: bool


class DistributedGang(Gang):
    """One rank of several. between_gpus: the group of NCCL, if every rank has a GPU of its own."""

    def __init__(self, rank: int, size: int, between_gpus: dist.ProcessGroup | None):
        self.rank, self.size, self._between_gpus = rank, size, between_gpus

    def gathered(self, value: T) -> list[T]:
        return [self._of(rank, value) for rank in range(self.size)]

    def of_first(self, value: T) -> T:
        return self._of(0, value)

    def sum_(self, x: Tensor) -> Tensor:
        for rows in panels(len(x)):
            x[rows] = add_up(self.gathered(x[rows]))
        return x

    def joined(self, x: Tensor) -> Tensor:
        return torch.cat(self.gathered(x))

    def each(self, items: Iterable[T], work: Callable[[T], Found]) -> Iterator[Found]:
        waiting = iter(items)
        while together := list(islice(waiting, self.size)):
            found = work(together[self.rank]) if self.rank < len(together) else None
            yield from (self._of(rank, found) for rank in range(len(together)))  # type: ignore[misc]

    def collect(
        self, items: Iterable[T], work: Callable[[T, Callable[..., None]], object], take: Callable[..., None]
    ) -> None:
        def found(item: T) -> list[tuple[Any, ...]]:
            waiting: list[tuple[Any, ...]] = []
            work(item, lambda *arguments: waiting.append(arguments))
            return waiting

        for of_item in self.each(items, found):
            for arguments in of_item:
                take(*arguments)

    def add_gradients(
        self, items: Iterable[T], backward: Callable[[T], Tensor], leaves: Sequence[Tensor]
    ) -> list[Tensor]:
        def gradients(item: T) -> tuple[Tensor, list[Tensor | None]]:
            result = backward(item)
            found = [leaf.grad for leaf in leaves]
            for leaf in leaves:
                leaf.grad = None
            return result, found

        results: list[Tensor] = []
        sums: list[Tensor | None] = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        for result, found in self.each(items, gradients):
            results.append(result)
            pairs = zip(sums, found, strict=True)
            sums = [new if known is None else known if new is None else known.add_(new) for known, new in pairs]
        for leaf, total in zip(leaves, sums, strict=True):
            leaf.grad = total
        return results

    @in_phase("exchange")
    def _of(self, rank: int, value: T) -> T:
        """The value of that rank, its tensors on the GPU here if they are there."""
        with _lost_ranks_reported():
            # Through the CPU in any case: gloo notices a rank that has ended, NCCL would wait for it.
            described = [tree_map(_described, value) if rank == self.rank else None]
            dist.broadcast_object_list(described, src=rank)
            if rank == self.rank:
                for leaf in tree_leaves(value):
                    if isinstance(leaf, Tensor):
                        carrier = self._carrier(leaf.is_cuda)
                        self._broadcast(rank, leaf.detach().to(carrier).contiguous())
                return value
            found: T = tree_map(lambda leaf: self._received(rank, leaf), described[0])
            return found

    def _received(self, rank: int, leaf: Any) -> Any:
        if not isinstance(leaf, _Described):
            return leaf
        tensor = torch.empty(leaf.shape, dtype=leaf.dtype, device=self._carrier(leaf.is_cuda))
        self._broadcast(rank, tensor)
        return tensor.to("cuda") if leaf.is_cuda else tensor

    def _broadcast(self, rank: int, tensor: Tensor) -> None:
        if tensor.numel():
            group = self._between_gpus if tensor.is_cuda else None
            # As bytes, since not every dtype can be sent.
            dist.broadcast(tensor.view(-1).view(torch.uint8), src=rank, group=group)

    def _carrier(self, is_cuda: bool) -> torch.device:
        return torch.device("cuda" if is_cuda and self._between_gpus is not None else "cpu")


def _described(leaf: Any) -> Any:
    return _Described(tuple(leaf.shape), leaf.dtype, leaf.is_cuda) if isinstance(leaf, Tensor) else leaf


@contextmanager
def _lost_ranks_reported() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(str(error)) from error


@contextmanager
def joined(rank: int, size: int, meeting: Path, device: torch.device) -> Iterator[DistributedGang]:
    """Be one of `size` ranks on this machine. meeting: a file for this gang alone, which does not exist yet.

    Raises LostRankError, here or within, if another rank ends.
    """
    with _lost_ranks_reported():
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(meeting), size), rank=rank, world_size=size, timeout=LONGEST_WAIT
        )
    try:
        between_gpus = None
        if device.type == "cuda" and torch.cuda.device_count() >= size:
            between_gpus = dist.new_group(backend="nccl", timeout=LONGEST_WAIT_NCCL)
        yield DistributedGang(rank, size, between_gpus)
    finally:
        dist.destroy_process_group()
