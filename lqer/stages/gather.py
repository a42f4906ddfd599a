"""Gathers the statistics of one decoder block's linears, batch by batch.

Linears that are called with the same tensor (q, k and v; gate and up) form one input site and share its statistics, if
they round it in the same way where statistics are those of rounded inputs.
Statistics of pairs of inputs, and token weights, need the block as the original model runs it: on every batch it runs
first, on the original model's hidden states.

Shapes: W windows, T tokens of a window, B windows of a batch, D hidden size, N tokens of a batch, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lqer.components import ADDED
from lqer.errors import ModelError
from lqer.lowrank.precision import full_float32
from lqer.methods.inputs import InputRounding
from lqer.models.residual import OUTPUT, find_writers, inverse_squares, watched_points
from lqer.models.structure import block_linears
from lqer.models.walker import BlockRun
from lqer.phases import in_phase, phase
from lqer.statistics import ALWAYS, Accumulator, Statistic
from lqer.statistics.sample import spread_indices
from lqer.statistics.site import SiteStatistics
from lqer.store.names import block_file, sites_file
from lqer.store.offload import Offload
from lqer.store.store import Artifact
from lqer.transforms.tracing import watched_inputs

TokenWeights = Literal["none", "residual"]
# By linear, of those whose statistics are of inputs as the quantized linear rounds them.
InputRoundings = Mapping[str, InputRounding]
NOT_ROUNDED: InputRoundings = {}


@dataclass(frozen=True)
class CalibrationText:
    """The windows that statistics are gathered on: int64 token ids, and how many windows make a micro-batch.

    error_tokens: how many of the tokens a sample keeps the inputs of. token_weights: what a token counts in E[x xᵀ] and
    E[x²] of linears that write to the residual stream: 1, or with "residual" the inverse square of the original model's
    stream behind the linear (lqer/models/residual.py).
    """

    windows_WT: Tensor
    batch_size: int
    error_tokens: int
    token_weights: TokenWeights = field(default="none", metadata=ADDED)

    @property
    def needs_original(self) -> bool:
        """Whether the weights of the tokens are those of the original model's residual stream."""
        return self.token_weights == "residual"


@dataclass(frozen=True)
class BlockStatistics:
    """The statistics of one block's input sites, as `<site>.<kind>`, and the site of each linear, by full names."""

    tensors: Mapping[str, Tensor]
    sites: Mapping[str, str]

    @classmethod
    @in_phase("statistics")
    def read(cls, calibration: Artifact, index: int) -> BlockStatistics:
        return cls(calibration.tensors(block_file(index)), calibration.json(sites_file(index)))

    @in_phase("statistics")
    def to(self, device: torch.device) -> BlockStatistics:
        return BlockStatistics({name: tensor.to(device) for name, tensor in self.tensors.items()}, self.sites)

    def of(self, linear: str) -> SiteStatistics:
        """A linear's statistics by kind. Raises ModelError if the calibration text never reached the linear."""
        prefix = f"{self._site(linear)}."
        return SiteStatistics(
            {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}
        )

    def by_site(self, linears: Iterable[str]) -> Iterator[tuple[str, SiteStatistics]]:
        """The linears with their statistics, those of one site after each other: they share one object.

        Raises ModelError if the calibration text never reached a linear.
        """
        members: dict[str, list[str]] = {}
        for linear in linears:
            members.setdefault(self._site(linear), []).append(linear)
        for names in members.values():
            statistics = self.of(names[0])
            yield from ((linear, statistics) for linear in names)

    def _site(self, linear: str) -> str:
        if linear not in self.sites:
            raise ModelError(f"{linear} was never reached by the calibration text: skip it or calibrate on more")
        return self.sites[linear]


# The statistics of blocks, given their indices in ascending order.
StatisticsOf = Callable[[Sequence[int]], Iterator[BlockStatistics]]


def stored_statistics(calibration: Artifact) -> StatisticsOf:
    """Those that a stage "calibrate" has stored."""
    return lambda indices: (BlockStatistics.read(calibration, index) for index in indices)


@dataclass(frozen=True)
class OriginalBatch:
    """One batch in the original model. inputs: of the block's linears; None where no statistic asks for them. weights:
    of the tokens, float32 (N,), for the linears where they are not all 1.
    """

    inputs: Mapping[str, Tensor] | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def input(self, linear: str, x: Tensor) -> Tensor | None:
        """The input of the same tokens (N, I) that x is the input of."""
        if self.inputs is None:
            return None
        original = self.inputs.get(linear)
        if original is None or original.shape != x.shape:
            raise ModelError(f"{linear} receives other tokens in the original model: their inputs cannot be paired")
        return original.flatten(0, -2)


class OriginalBlock:
    """The block as the original model runs it. paired, weighted: what is wanted of its batches."""

    def __init__(self, run: BlockRun, paired: bool, weighted: bool):
        self._run, self._paired = run, paired
        self._writers = find_writers(run) if weighted else {}

    def batch(self, index: int) -> OriginalBatch:
        """Run one batch; the hidden states stay the block's inputs."""
        if not (self._paired or self._writers):
            return OriginalBatch()
        block = self._run.block
        inputs: dict[str, Tensor] = {}
        linears = block_linears(block) if self._paired else []
        watch = {name: partial(inputs.__setitem__, name) for name in linears}
        with watched_inputs(block, watch), watched_points(block, self._writers) as weights:
            weights[OUTPUT] = inverse_squares(self._run.output(index))
        by_writer = {writer: weights[point] for writer, point in self._writers.items()}
        return OriginalBatch(inputs if self._paired else None, by_writer)


class SiteObserver:
    """Finds which linears of a block share an input, and feeds the accumulators of each input site."""

    def __init__(
        self,
        statistics: Collection[Statistic],
        tokens: int,
        sampled: int,
        device: torch.device,
        offload: Offload,
        roundings: InputRoundings = NOT_ROUNDED,
    ):
        self.accumulators: dict[str, dict[str, Accumulator]] = {}
        self.site_of: dict[str, str] = {}
        self._statistics, self._tokens, self._sampled = statistics, tokens, sampled
        self._device, self._offload, self._roundings = device, offload, roundings
        self._first_token = 0
        self._original = OriginalBatch()
        self._last_input: Tensor | None = None
        self._last_version = 0
        # Of that input, by how it is rounded.
        self._last_sites: dict[InputRounding | None, str] = {}
        # Sites with as many tokens sample the same ones.
        self._sampled_of: dict[int, Tensor] = {}

    def begin_batch(self, first_token: int, original: OriginalBatch) -> None:
        """What is seen next is a batch whose first token has that index in the whole text."""
        self._first_token, self._original, self._last_input = first_token, original, None
        self._sampled_of.clear()

    @in_phase("statistics")
    def see(self, linear: str, x: Tensor) -> None:
        """Take in the input of a linear that is being called."""
        # Linears that share an input are called one after the other with the very same tensor, unchanged in between.
        rounding = self._roundings.get(linear)
        if x is not self._last_input or x._version != self._last_version:
            self._last_input, self._last_version, self._last_sites = x, x._version, {}
        if rounding in self._last_sites:
            self.site_of.setdefault(linear, self._last_sites[rounding])
            return
        site = self._last_sites[rounding] = self.site_of.setdefault(linear, linear)
        x_NI = x.flatten(0, -2)
        if rounding is not None:
            x_NI = rounding.round(x_NI)
        if site not in self.accumulators:
            self.accumulators[site] = {
                statistic.kind: statistic.accumulator(x_NI.shape[1], self._device, self._offload)
                for statistic in self._statistics
            }
        original_NI = self._original.input(linear, x)
        weights_N = self._original.weights.get(linear)
        if len(x_NI) not in self._sampled_of:
            indices_N = spread_indices(self._first_token, len(x_NI), self._tokens, self._sampled)
            self._sampled_of[len(x_NI)] = indices_N.to(x.device)
        # Whatever precision the process chose for the model's own products.
        with full_float32():
            for statistic in self._statistics:
                weights = () if weights_N is None or not statistic.weights_tokens else (weights_N,)
                accumulator = self.accumulators[site][statistic.kind]
                accumulator.add(x_NI, original_NI, self._sampled_of[len(x_NI)], *weights)


def drop_output(batch: int, output_BTD: Tensor) -> None:
    """Leave the hidden states as they are: the block's inputs."""


def observe_block(
    run: BlockRun,
    original: BlockRun | None,
    text: CalibrationText,
    statistics: Collection[Statistic],
    use_output: Callable[[int, Tensor], None] = drop_output,
    roundings: InputRoundings = NOT_ROUNDED,
    linears: Collection[str] | None = None,
) -> BlockStatistics:
    """The statistics of a block's linears on the hidden states that reach it: `ALWAYS`, and those asked for.

    original: the original block on the original model's hidden states, for statistics of pairs of inputs and token
    weights; None where `run` is that. Batch by batch it is run first, and its hidden states stay its inputs.
    use_output: gets the index of every batch and what `run` outputs there. roundings: of the inputs before anything is
    gathered from them, by linear of the block; both blocks run on inputs as they are. linears: those to gather from, by
    their names within the block; all by default. Raises ModelError, naming the linear, where an input is NaN or
    infinite, and for a block whose tokens cannot be weighted.
    """
    gathered = gathered_statistics(statistics)
    paired = any(statistic.needs_original for statistic in gathered)
    if paired and original is None:
        raise ValueError("a statistic of pairs of inputs needs the original block")
    reference = OriginalBlock(original or run, paired, text.needs_original)
    tokens = text.windows_WT.numel()
    observer = SiteObserver(gathered, tokens, text.error_tokens, run.device, run.hidden.offload, roundings)
    watch = {name: partial(observer.see, name) for name in linears or block_linears(run.block)}
    for batch, windows in enumerate(run.hidden.batches):
        observer.begin_batch(windows.start * text.windows_WT.shape[1], reference.batch(batch))
        with watched_inputs(run.block, watch):
            output_BTD = run.output(batch)
        use_output(batch, output_BTD)
    tensors: dict[str, Tensor] = {}
    for site, accumulators in observer.accumulators.items():
        full_name = f"{run.name}.{site}"
        for kind in list(accumulators):
            # Sums in float64 are dropped one by one: all of them beside all results may be more than a GPU holds.
            with phase("statistics"):
                tensor = accumulators.pop(kind).result()
            if not torch.isfinite(tensor).all():
                dtype = str(run.hidden.states_WTD.dtype).removeprefix("torch.")
                raise ModelError(
                    f"the calibration inputs of {full_name} hold NaN or infinities, although the weights are finite: "
                    f"activations in {dtype} overflow; use another dtype"
                )
            tensors[f"{full_name}.{kind}"] = tensor
    sites = {f"{run.name}.{name}": f"{run.name}.{site}" for name, site in observer.site_of.items()}
    return BlockStatistics(tensors, sites)


def within_block(roundings: InputRoundings, block: str) -> InputRoundings:
    """The roundings of the linears of one block, by their names within it."""
    prefix = f"{block}."
    return {name.removeprefix(prefix): found for name, found in roundings.items() if name.startswith(prefix)}


def gathered_statistics(requested: Collection[Statistic]) -> list[Statistic]:
    """`ALWAYS` and those requested, each once, in an order that does not depend on that of `requested`."""
    return [*ALWAYS, *sorted(set(requested) - set(ALWAYS), key=lambda statistic: statistic.kind)]
