"""Gathers the statistics of a decoder block's experts: on the tokens that the router sends to each, or on all.

    routed    an expert's inputs are its own tokens; one that is sent fewer than `minimum` of them also gets as many
              others as are missing, spread evenly over the text: so it is never quantized on nothing
    all       every expert gets every token

An expert is observed beside the forward pass, on the inputs of the layer, and run no further than the linears that are
asked for. So it can be run on others too: on what is missing, and on the original model's inputs of the same tokens.

Shapes: T tokens of a batch, D hidden size, E experts, N tokens of an expert, M kept tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lqer.models.structure import block_linears
from lqer.models.walker import BlockRun
from lqer.nn.experts import Experts, count, expert_inputs, experts_of, routes
from lqer.stages.observe import OriginalBatch, SiteObserver
from lqer.statistics import Gang, Statistic
from lqer.statistics.gang import add_up
from lqer.statistics.sample import evenly_spread, spread_indices
from lqer.transforms.tracing import hooked

# After the name of a module of experts: int64 (E,), how many tokens of the text were sent to each.
ROUTED_TOKENS = "routed_tokens"
# Bytes of sums on a GPU; experts beyond that are observed in another pass. A layer of gpt-oss-120b needs 17 GB.
PASS_BYTES = 18_000_000_000


@dataclass(frozen=True)
class ExpertTokens:
    """Which tokens experts are calibrated on, and how many at least where these are each one's own."""

    of: Literal["routed", "all"] = "routed"
    minimum: int = 512


@dataclass(frozen=True)
class _Tokens:
    """Inputs of a layer of experts, those of the original model, and weights of outputs; None where not asked for."""

    x_ND: Tensor
    original_ND: Tensor | None
    weights_N: Tensor | None

    def at(self, indices_N: Tensor) -> _Tokens:
        found = (None if part is None else part[indices_N] for part in (self.original_ND, self.weights_N))
        return _Tokens(self.x_ND[indices_N], *found)


@dataclass(frozen=True)
class _Layer:
    """A module of experts. linears: by expert, those that are observed, by their names within the block. kept: tokens
    spread over the text.
    """

    name: str
    experts: Experts
    linears: dict[int, list[str]]
    routed_E: Tensor
    kept: list[_Tokens] = field(default_factory=list)


class ExpertObserver:
    """Feeds the sites of a block's experts. names: the linears to gather from. tokens: of the whole text."""

    def __init__(
        self,
        run: BlockRun,
        original: BlockRun,
        settings: ExpertTokens,
        sites: SiteObserver,
        names: Collection[str],
        tokens: int,
    ):
        self._original = original.block
        self._settings, self._sites, self._tokens = settings, sites, tokens
        self._layers = [
            _Layer(name, experts, linears, torch.zeros(count(experts), dtype=torch.int64))
            for name, experts in experts_of(run.block).items()
            if (linears := _by_expert(name, names))
        ]

    @property
    def modules(self) -> list[str]:
        """The modules whose inputs the experts that are observed here read, by their names within the block."""
        return [layer.name for layer in self._layers]

    @property
    def linears(self) -> set[str]:
        """The linears that are observed here, by their names within the block."""
        return {name for layer in self._layers for names in layer.linears.values() for name in names}

    @contextmanager
    def watching(self, first_token: int, original: OriginalBatch) -> Iterator[None]:
        """While active, a batch whose first token has that index in the whole text is run through the block."""

        def hook(layer: _Layer) -> Callable[..., None]:
            return lambda module, args: self._see(layer, first_token, original, *args[:2])

        with hooked(layer.experts.register_forward_pre_hook(hook(layer)) for layer in self._layers):
            yield

    def join(self, gang: Gang) -> None:
        """Take in what the other ranks have routed and kept, of other windows, in their order."""
        for layer in self._layers:
            layer.routed_E.copy_(add_up(gang.gathered(layer.routed_E)))
            kept = [(tokens.x_ND, tokens.original_ND, tokens.weights_N) for tokens in layer.kept]
            layer.kept[:] = [_Tokens(*parts) for of_rank in gang.gathered(kept) for parts in of_rank]

    @torch.no_grad()
    def complete(self) -> dict[str, Tensor]:
        """Give every expert the tokens that it lacks. Returns `routed_tokens` by its name within the block."""
        for layer in self._layers if self._settings.of == "routed" else ():
            lacking = (self._settings.minimum - layer.routed_E).clamp(min=0).tolist()
            starved = [index for index in layer.linears if lacking[index]]
            # Nothing is known of a layer that no text reaches.
            if not starved or not layer.kept:
                continue
            kept = _joined(layer.kept)
            size = len(kept.x_ND)
            for index in starved:
                others_N = evenly_spread(min(lacking[index], size), size, kept.x_ND.device)
                self._observe(layer, index, kept.at(others_N), part_of=size)
        return {f"{layer.name}.{ROUTED_TOKENS}": layer.routed_E for layer in self._layers}

    def _see(self, layer: _Layer, first_token: int, original: OriginalBatch, x_TD: Tensor, top_k_index: Tensor) -> None:
        """Take in a batch: the layer's inputs, and where the router sends them."""
        batch = _Tokens(x_TD, (original.inputs or {}).get(layer.name), original.weights.get(layer.name))
        sent = {index: tokens_N for index, tokens_N, _ in routes(top_k_index, len(layer.routed_E))}
        for index, tokens_N in sent.items():
            layer.routed_E[index] += len(tokens_N)
        if self._settings.of == "all":
            for index in layer.linears:
                self._observe(layer, index, batch, first_token=first_token)
            return
        kept_M = spread_indices(first_token, len(x_TD), self._tokens, self._settings.minimum, x_TD.device)
        layer.kept.append(batch.at(kept_M))
        for index in sorted(layer.linears.keys() & sent):
            self._observe(layer, index, batch.at(sent[index]), part_of=len(x_TD))

    def _observe(
        self, layer: _Layer, index: int, tokens: _Tokens, first_token: int = 0, part_of: int | None = None
    ) -> None:
        """Observe one expert on these tokens, see `SiteObserver.begin_batch`."""
        full_names = {name.rpartition(".")[2]: name for name in layer.linears[index]}
        inputs: dict[str, Tensor] | None = None
        if tokens.original_ND is not None:
            experts = self._original.get_submodule(layer.name)
            of_original = expert_inputs(experts, index, tokens.original_ND, full_names)
            inputs = {full_names[linear]: x for linear, x in of_original.items()}
        writers = [name for linear, name in full_names.items() if linear == "down_proj"]
        weights = {} if tokens.weights_N is None else dict.fromkeys(writers, tokens.weights_N)
        self._sites.begin_batch(first_token, OriginalBatch(inputs, weights), part_of)
        for linear, x in expert_inputs(layer.experts, index, tokens.x_ND, full_names).items():
            self._sites.see(full_names[linear], x)


def passes_of(run: BlockRun, names: Collection[str], statistics: Sequence[Statistic]) -> list[list[str]]:
    """The linears of a block in groups, all of them but for experts on a GPU, the sums of each of which fit there."""
    if run.device.type != "cuda" or not (layers := experts_of(run.block)):
        return [list(names)]
    inside = {name for layer in layers for found in _by_expert(layer, names).values() for name in found}
    passes, size = [[name for name in names if name not in inside]], 0
    widths = {name: linear.in_features for name, linear in block_linears(run.block).items()}
    for layer in layers:
        for found in _by_expert(layer, names).values():
            # Gate and up read one input.
            inputs = {name.endswith(".down_proj"): widths[name] for name in found}
            needed = sum(statistic.nbytes(width) for width in inputs.values() for statistic in statistics)
            if size and size + needed > PASS_BYTES:
                passes, size = [*passes, []], 0
            passes[-1] += found
            size += needed
    return passes


def _by_expert(layer: str, names: Collection[str]) -> dict[int, list[str]]:
    """The linears that belong to an expert of that module, by expert, in ascending order."""
    prefix, found = f"{layer}.", defaultdict[int, list[str]](list)
    for name in names:
        index = name.removeprefix(prefix).partition(".")[0]
        if name.startswith(prefix) and index.isdigit():
            found[int(index)].append(name)
    return dict(sorted(found.items()))


def _joined(parts: Sequence[_Tokens]) -> _Tokens:
    def joined(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    x_ND = joined("x_ND")
    assert x_ND is not None, "only what is compared may be absent"
    return _Tokens(x_ND, joined("original_ND"), joined("weights_N"))
