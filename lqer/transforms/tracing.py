"""The inputs of a module's linears and the outputs of its norms, which of them are the same tensor, and where they end.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# Tokens that a block is probed with: enough for every channel that is ever used to be seen in use.
PROBED_TOKENS = 512


@dataclass(frozen=True)
class Seen:
    """A tensor when a module read or returned it; memory, layout and version identify it."""

    tensor: Tensor
    version: int

    @classmethod
    def now(cls, tensor: Tensor) -> Seen:
        return cls(tensor, tensor._version)

    @property
    def identity(self) -> tuple[object, ...]:
        return (self.tensor.data_ptr(), self.tensor.shape, self.tensor.stride(), self.version)

    def same(self, other: Seen) -> bool:
        return self.identity == other.identity


@dataclass(frozen=True)
class Trace:
    """One run of a module. It keeps the tensors alive, so that an address belongs to one of them."""

    inputs: dict[str, Seen]  # of linears, in the order of their calls
    outputs: dict[str, Seen]  # of norms: modules with a vector called weight
    result: Any

    def sites(self) -> list[tuple[str, ...]]:
        """The linears in the order of their calls, grouped by the tensor they are called with."""
        groups: dict[object, list[str]] = {}
        for name, seen in self.inputs.items():
            groups.setdefault(seen.identity, []).append(name)
        return [tuple(names) for names in groups.values()]

    def norms_before(self, linear: str) -> list[str]:
        """The norms whose output is the linear's input."""
        return [name for name, output in self.outputs.items() if output.same(self.inputs[linear])]


def enough_to_probe(hidden_BTD: Tensor) -> Tensor:
    """The first sequences of a batch, as few as hold PROBED_TOKENS tokens."""
    return hidden_BTD[: -(-PROBED_TOKENS // hidden_BTD.shape[1])]


def output_stays(changed_BTD: Tensor, output_BTD: Tensor, hidden_BTD: Tensor) -> bool:
    """Whether a block that turned hidden states into `output_BTD` still does, up to the rounding of its dtype.

    The block adds its branches to the hidden states: a change that is none alters them by rounding alone, any other by
    about their own size.
    """
    difference, branches = (
        torch.linalg.vector_norm((output_BTD - x.to(output_BTD)).float()) for x in (changed_BTD, hidden_BTD)
    )
    return bool(difference <= torch.finfo(output_BTD.dtype).eps ** 0.5 * branches)


@contextmanager
def hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keep the hooks that the iterable registers while active; then all of them are removed."""
    with ExitStack() as registered:
        for hook in hooks:
            registered.enter_context(hook)
        yield


@contextmanager
def watched_inputs(module: nn.Module, watch: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """While active, pass the input of every call of a linear that `watch` names to its function."""

    def hook(see: Callable[[Tensor], None]) -> Callable[..., None]:
        return lambda module, args: see(args[0])

    with hooked(module.get_submodule(name).register_forward_pre_hook(hook(see)) for name, see in watch.items()):
        yield


class AllCalledError(Exception):
    """Ends a run of a module of which the rest is not needed."""


class UntilCalled:
    """Runs a module as far as it takes to call some of the modules within it, by their names.

    The first run is whole. Where it calls each of them once, later ones end when all have been called: before that of
    the last one runs, but after what has been told to watch its input. Else all runs are whole.
    """

    def __init__(self, module: nn.Module, names: Collection[str]):
        self._module, self._names = module, set(names)
        self._ends: bool | None = None

    def run(self, run: Callable[[], object]) -> None:
        """Call `run`, which runs the module, as far as it takes."""
        calls = Counter[str]()

        def hook(name: str) -> Callable[..., None]:
            def count(module: nn.Module, args: tuple[Any, ...]) -> None:
                calls[name] += 1
                if self._ends and len(calls) == len(self._names):
                    raise AllCalledError

            return count

        with hooked(self._module.get_submodule(name).register_forward_pre_hook(hook(name)) for name in self._names):
            try:
                run()
            except AllCalledError:
                return
        if self._ends is None:
            self._ends = all(calls[name] == 1 for name in self._names)


@torch.no_grad()
def trace(
    module: nn.Module, run: Callable[[], Any], linears: type[nn.Module] | tuple[type[nn.Module], ...] = nn.Linear
) -> Trace:
    """Watch the linears and norms of `module` while `run` runs it."""
    inputs: dict[str, Seen] = {}
    outputs: dict[str, Seen] = {}

    def see_input(name: str) -> Callable[..., None]:
        return lambda module, args: inputs.__setitem__(name, Seen.now(args[0]))

    def see_output(name: str) -> Callable[..., None]:
        return lambda module, args, output: outputs.__setitem__(name, Seen.now(output))

    def hooks() -> Iterator[RemovableHandle]:
        for name, child in module.named_modules():
            weight = getattr(child, "weight", None)
            if isinstance(child, linears):
                yield child.register_forward_pre_hook(see_input(name))
            elif isinstance(weight, Tensor) and weight.ndim == 1:
                yield child.register_forward_hook(see_output(name))

    with hooked(hooks()):
        return Trace(inputs, outputs, run())
