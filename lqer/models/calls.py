"""The arguments that a model calls its decoder blocks with, recorded batch by batch.

Most arguments are the same for all batches of one shape and are stored once. Those that differ are stored per batch, in
memory or on disk. What blocks leave for later ones is handed on batch by batch: in lists and mappings among their
arguments, such as the keys and values that several of them share, and in what they return beside the hidden states,
such as the tokens that an indexer has chosen for the attention of the next blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lqer.store.offload import Offload

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Returned:
    """Stands, among the arguments of a block, for what another block returns at that place of a tuple."""

    block: int
    place: int


# What blocks left for later ones: content of a list or mapping by the position or name of the argument, and what a
# block returned.
Left = dict[int | str | Returned, Any]


@dataclass
class BlockCall:
    """The arguments of a call of one block after the hidden states, its first positional argument.

    per_window: positions, among the leaves of (args, kwargs), of tensors (1, ...) that a batch has once per window, all
    equal. Most attentions broadcast them; some want them as large as the batch.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    per_window: frozenset[int] = frozenset()

    def to(self, device: torch.device) -> BlockCall:
        """The call with tensors on the device, and lists and mappings of its own, which nobody else sees written to."""

        def moved(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return leaf.to(device)
            return copy.copy(leaf) if isinstance(leaf, MutableMapping | MutableSequence) else leaf

        args, kwargs = tree_map(moved, (self.args, self.kwargs))
        return BlockCall(args, kwargs, self.per_window)

    @property
    def may_hand_on(self) -> bool:
        """Whether blocks could leave something for this one, or this one for others."""
        return bool(self._writable() or self.returned)

    @property
    def returned(self) -> list[Returned]:
        """The arguments that other blocks have returned."""
        return [one for one in (*self.args, *self.kwargs.values()) if isinstance(one, Returned)]

    def without_returned(self) -> BlockCall:
        """The call with None in the place of what other blocks return."""

        def kept(one: Any) -> Any:
            return None if isinstance(one, Returned) else one

        return replace(self, args=tuple(map(kept, self.args)), kwargs={key: kept(x) for key, x in self.kwargs.items()})

    def put(self, left: Left, device: torch.device) -> None:
        """Put what earlier blocks left into the arguments, tensors on the device."""
        found = {one: _on(left[one], device) for one in self.returned}
        self.args = tuple(found[one] if isinstance(one, Returned) else one for one in self.args)
        self.kwargs |= {key: found[one] for key, one in self.kwargs.items() if isinstance(one, Returned)}
        for key, container in self._writable().items():
            content = _on(_plain(left.get(key, ())), device)
            if isinstance(container, MutableMapping):
                container.update(content)
            else:
                container[:] = content or container

    def left(self, recorded: BlockCall) -> Left:
        """What this block and earlier ones left in lists and mappings of the recorded call, tensors on the CPU."""
        given = recorded._writable()
        return {
            key: _on(_plain(container), CPU)
            for key, container in self._writable().items()
            if not _identical(_plain(container), _plain(given[key]))
        }

    def _writable(self) -> dict[int | str, Any]:
        arguments: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        return {key: one for key, one in arguments if isinstance(one, MutableMapping | MutableSequence)}


def returned_by(values: Sequence[Any], next_call: BlockCall) -> Left:
    """The values that a block has returned and the next one is called with; tensors are on the CPU."""
    return {one: _on(values[one.place], CPU) for one in next_call.returned}


def _plain(container: Any) -> Any:
    """The content as a dictionary or list."""
    return dict(container) if isinstance(container, Mapping) else list(container)


def _on(content: Any, device: torch.device) -> Any:
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, content)


def _identical(content: Any, other: Any) -> bool:
    """Whether both hold the very same objects."""
    leaves, structure = tree_flatten(content)
    others, other_structure = tree_flatten(other)
    return structure == other_structure and all(a is b for a, b in zip(leaves, others, strict=True))


class Comparison:
    """Compares tensors; those that many blocks are called with, such as masks, once."""

    def __init__(self) -> None:
        # The tensors themselves are kept, so that no other gets the identity of one that was freed.
        self._known: dict[tuple[int, int], tuple[bool, Tensor, Tensor]] = {}

    def equal(self, a: Tensor, b: Tensor) -> bool:
        """Whether they have the same shape, dtype and values."""
        if a is b:
            return True
        key = (id(a), id(b))
        if key not in self._known:
            same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device))
            self._known[key] = (same, a, b)
        return self._known[key][0]


class RecordedCalls:
    """How one block is called for each batch."""

    def __init__(self, offload: Offload):
        self.calls: list[BlockCall] = []
        self._offload = offload
        self._first_of: dict[torch.Size, BlockCall] = {}
        self._differ = False

    def add(self, call: BlockCall, shape: torch.Size, compared: Comparison) -> None:
        """Record the call for the next batch, whose hidden states have that shape."""
        first = self._first_of.setdefault(shape, call)
        leaves, structure = tree_flatten((call.args, call.kwargs))
        known, known_structure = tree_flatten((first.args, first.kwargs))
        if structure != known_structure:
            self._differ = True
            self.calls.append(call)
            return
        stored = [self._stored(leaf, other, compared) for leaf, other in zip(leaves, known, strict=True)]
        if all(leaf is other for leaf, other in zip(stored, known, strict=True)):
            self.calls.append(first)
            return
        self._differ = True
        self.calls.append(BlockCall(*tree_unflatten(stored, structure)))

    def general(self, of_one: BlockCall) -> BlockCall | None:
        """`of_one`, the call for a single window, if its arguments broadcast to those of every batch; else None."""
        if self._differ:
            return None
        compared, per_window = Comparison(), set[int]()
        one, structure = tree_flatten((of_one.args, of_one.kwargs))
        for call in self._first_of.values():
            leaves, other_structure = tree_flatten((call.args, call.kwargs))
            if structure != other_structure:
                return None
            if not all(_broadcasts(a, b, compared) for a, b in zip(one, leaves, strict=True)):
                return None
            per_window |= {i for i, (a, b) in enumerate(zip(one, leaves, strict=True)) if _is_per_window(a, b)}
        return replace(of_one, per_window=frozenset(per_window))

    def _stored(self, leaf: Any, known: Any, compared: Comparison) -> Any:
        """`known` where the leaf equals it, else the leaf, a tensor offloaded."""
        if not isinstance(leaf, Tensor):
            return known if leaf is known or (type(leaf) is type(known) and bool(leaf == known)) else leaf
        if isinstance(known, Tensor) and compared.equal(leaf, known):
            return known
        buffer = self._offload.empty(tuple(leaf.shape), leaf.dtype, leaf.is_cuda)
        buffer.copy_(leaf)
        return buffer


def _is_per_window(of_one: Any, of_batch: Any) -> bool:
    return isinstance(of_one, Tensor) and of_one.shape != of_batch.shape


def _broadcasts(of_one: Any, of_batch: Any, compared: Comparison) -> bool:
    if not isinstance(of_one, Tensor) or not isinstance(of_batch, Tensor):
        return type(of_one) is type(of_batch)
    if of_one.ndim != of_batch.ndim:
        return False
    if of_one.shape != of_batch.shape and of_one.ndim > 0 and of_one.shape[0] == 1:
        return of_one.shape[1:] == of_batch.shape[1:] and torch.equal(of_one.expand_as(of_batch), of_batch)
    return compared.equal(of_one, of_batch)
