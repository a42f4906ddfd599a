"""Observes the linears of one decoder block: which of them share an input, and what statistics are of those inputs.

Statistics of pairs of inputs, and token weights, need the block as the original model runs it: on every batch it runs
first, on the original model's hidden states.

Shapes: W windows, T tokens of a window, N tokens of a batch, I in_features.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lqer.errors import ModelError
from lqer.lowrank.precision import full_float32
from lqer.methods.inputs import InputRounding
from lqer.models.residual import OUTPUT, find_writers, inverse_squares, watched_points
from lqer.models.structure import block_linears
from lqer.models.walker import BlockRun
from lqer.nn.experts import experts_of
from lqer.phases import in_phase
from lqer.statistics import Accumulator, Gang, Statistic
from lqer.statistics.sample import evenly_spread, spread_indices
from lqer.store.offload import Offload
from lqer.transforms.tracing import watched_inputs

# Keys are the linears whose statistics are of inputs as the quantized linear rounds them.
InputRoundings = Mapping[str, InputRounding]
NOT_ROUNDED: InputRoundings = {}


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
            raise ModelError(f"{linear} gets different tokens in the original model: its inputs cannot be paired")
        return original.flatten(0, -2)


class OriginalBlock:
    """The block as the original model runs it. paired, by_stream: what is wanted of its batches. weights: of all tokens
    of the text, float32 (W, T), for linears whose tokens are weighted by something else than the stream.
    """

    def __init__(self, run: BlockRun, paired: bool, by_stream: bool, weights: Mapping[str, Tensor]):
        self._run, self._paired = run, paired
        self._writers = find_writers(run) if by_stream else {}
        self._weights = {name: weights_WT.to(run.device) for name, weights_WT in weights.items()}

    def batch(self, index: int) -> OriginalBatch:
        """Run one batch, if anything of it is wanted; the hidden states stay the block's inputs."""
        hidden = self._run.hidden
        first = hidden.first_window + hidden.batches[index].start
        ours = slice(first, hidden.first_window + hidden.batches[index].stop)
        given = {name: weights_WT[ours].flatten() for name, weights_WT in self._weights.items()}
        if not (self._paired or self._writers):
            return OriginalBatch(weights=given)
        block = self._run.block
        inputs: dict[str, Tensor] = {}
        # For experts, the inputs of all of them, from which those of each follow.
        linears = [*block_linears(block), *experts_of(block)] if self._paired else []
        watch = {name: partial(inputs.__setitem__, name) for name in linears}
        with watched_inputs(block, watch), watched_points(block, self._writers) as weights:
            weights[OUTPUT] = inverse_squares(self._run.output(index))
        by_writer = {writer: weights[point] for writer, point in self._writers.items()}
        return OriginalBatch(inputs if self._paired else None, by_writer | given)


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
        self._widths: dict[str, int] = {}
        self._statistics, self._tokens, self._sampled = statistics, tokens, sampled
        self._device, self._offload, self._roundings = device, offload, roundings
        self._first_token = 0
        self._part_of: int | None = None
        self._original = OriginalBatch()
        self._last_input: Tensor | None = None
        self._last_version = 0
        # The sites of that input, by how it is rounded.
        self._last_sites: dict[InputRounding | None, str] = {}
        # Sites with as many tokens sample the same ones.
        self._sampled_of: dict[int, Tensor] = {}

    def begin_batch(self, first_token: int, original: OriginalBatch, part_of: int | None = None) -> None:
        """What is seen next is a batch whose first token has that index in the whole text.

        part_of: where it is some of a batch's tokens, as an expert's, how many that batch has.
        """
        self._first_token, self._original, self._last_input, self._part_of = first_token, original, None, part_of
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
        self._begin_site(site, x_NI.shape[1])
        original_NI = self._original.input(linear, x)
        weights_N = self._original.weights.get(linear)
        if len(x_NI) not in self._sampled_of:
            self._sampled_of[len(x_NI)] = self._sampled_among(len(x_NI), x.device)
        # Whatever precision the process chose for the model's own products.
        with full_float32():
            for statistic in self._statistics:
                weights = () if weights_N is None or not statistic.weights_tokens else (weights_N,)
                accumulator = self.accumulators[site][statistic.kind]
                accumulator.add(x_NI, original_NI, self._sampled_of[len(x_NI)], *weights)

    def join(self, gang: Gang) -> None:
        """Take in what the other ranks have seen, of other windows, in their order."""
        for site_of, widths in gang.gathered((self.site_of, self._widths)):
            self.site_of = self.site_of | {name: site for name, site in site_of.items() if name not in self.site_of}
            for site, width in widths.items():
                self._begin_site(site, width)
        # In an order that does not depend on which windows are this rank's.
        for site in sorted(self.accumulators):
            for accumulator in self.accumulators[site].values():
                accumulator.join(gang)

    def _begin_site(self, site: str, in_features: int) -> None:
        if site not in self.accumulators:
            self._widths[site] = in_features
            self.accumulators[site] = {
                statistic.kind: statistic.accumulator(in_features, self._device, self._offload)
                for statistic in self._statistics
            }

    def _sampled_among(self, rows: int, device: torch.device) -> Tensor:
        """Which of a batch's tokens are in the sample; of some of its tokens as many as of the whole, at least one."""
        if self._part_of is None:
            return spread_indices(self._first_token, rows, self._tokens, self._sampled, device)
        share = -(-self._sampled * self._part_of // self._tokens)
        return evenly_spread(min(share, rows), rows, device)
