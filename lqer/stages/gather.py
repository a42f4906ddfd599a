"""Gathers the statistics of one decoder block's linears, batch by batch.

Linears that are called with the same tensor (q, k and v; gate and up) form one input site and share its statistics, if
they round it in the same way where statistics are those of rounded inputs. Experts are observed on tokens of their own
(lqer/stages/gather_experts.py).

Shapes: W windows, T tokens of a window, B windows of a batch, D hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from lqer.components import ADDED
from lqer.errors import ModelError
from lqer.models.structure import block_linears, within_block
from lqer.models.walker import BlockRun
from lqer.nn.experts import expert_of_linear
from lqer.phases import in_phase, phase
from lqer.stages.gather_experts import ROUTED_TOKENS, ExpertObserver, ExpertTokens, passes_of
from lqer.stages.observe import NOT_ROUNDED, InputRoundings, OriginalBlock, SiteObserver
from lqer.stages.weigh_tokens import WeighTokens
from lqer.statistics import ALWAYS, Sample, Statistic
from lqer.statistics.site import SiteStatistics
from lqer.store.names import block_file, sites_file
from lqer.store.store import Artifact, Store
from lqer.transforms.tracing import UntilCalled, watched_inputs

TokenWeights = Literal["none", "residual", "gradient"]


@dataclass(frozen=True)
class CalibrationText:
    """The windows that statistics are gathered on: int64 token ids, and how many windows make a micro-batch.

    error_tokens: how many of the tokens a sample keeps the inputs of. token_weights: what a token counts in E[x xᵀ] and
    E[x²]: 1, with "residual" for linears that write to the residual stream the inverse square of the original model's
    stream behind the linear (lqer/models/residual.py), with "gradient" what `gradient_weights` say: the stage that
    finds them or, once it has (`with_weights`), what they are. experts: which tokens an expert is calibrated on.
    beside: by window, what a wrapper is given beside token ids, such as images; () for text.
    """

    windows_WT: Tensor
    batch_size: int
    error_tokens: int
    token_weights: TokenWeights = field(default="none", metadata=ADDED)
    experts: ExpertTokens = field(default=ExpertTokens(), metadata=ADDED)
    beside: tuple[Mapping[str, Tensor], ...] = field(default=(), metadata=ADDED)
    gradient_weights: WeighTokens | Mapping[str, Tensor] | None = field(default=None, metadata=ADDED)

    @property
    def batches(self) -> int:
        """How many micro-batches there are, the last one smaller if need be."""
        return -(-len(self.windows_WT) // self.batch_size)

    @property
    def needs_original(self) -> bool:
        """Whether the weights of the tokens are those of the original model's residual stream."""
        return self.token_weights == "residual"

    def with_weights(self, store: Store) -> CalibrationText:
        """The text with the weights of its tokens by the gradient, where it asks for them."""
        weights = self.gradient_weights
        return replace(self, gradient_weights=weights.weights(store)) if isinstance(weights, WeighTokens) else self

    def weights_within(self, block: str) -> dict[str, Tensor]:
        """Weights by the gradient, float32 (W, T), of the linears of a block, by their names within it."""
        weights = self.gradient_weights
        if weights is None:
            return {}
        assert not isinstance(weights, WeighTokens), "a stage that gathers statistics takes `with_weights` first"
        return within_block(weights, block)


@dataclass(frozen=True)
class BlockStatistics:
    """The statistics of one block's input sites, as `<site>.<kind>`, and the site of each linear, by full names."""

    tensors: Mapping[str, Tensor]
    sites: Mapping[str, str]

    @classmethod
    @in_phase("statistics")
    def read(cls, calibration: Artifact, index: int) -> BlockStatistics:
        return cls(calibration.tensors(block_file(index)), calibration.json(sites_file(index)))

    def of(self, linear: str) -> SiteStatistics:
        """A linear's statistics by kind. Raises ModelError if the calibration text never reached the linear."""
        return self._on(self._site(linear), None)

    def by_site(self, linears: Iterable[str], device: torch.device) -> Iterator[tuple[str, SiteStatistics]]:
        """The linears with their statistics on the device, those of one site after each other: they share one object.

        Raises ModelError if the calibration text never reached a linear.
        """
        for site, names in self.members(linears).items():
            with phase("statistics"):
                statistics = self._on(site, device)
            yield from ((linear, statistics) for linear in names)

    def members(self, linears: Iterable[str]) -> dict[str, list[str]]:
        """The linears by site. Raises ModelError if the calibration text never reached a linear."""
        found: dict[str, list[str]] = {}
        for linear in linears:
            found.setdefault(self._site(linear), []).append(linear)
        return found

    def routed_tokens(self, linear: str) -> int | None:
        """How many tokens the router sent to the expert that a linear belongs to; None for any other linear."""
        if (of_expert := expert_of_linear(linear)) is None:
            return None
        mixture, expert = of_expert
        routed_E = self.tensors.get(f"{mixture}.{ROUTED_TOKENS}")
        return None if routed_E is None else int(routed_E[expert])

    def _on(self, site: str, device: torch.device | None) -> SiteStatistics:
        kinds = self._kinds[site]
        return SiteStatistics({kind: self.tensors[f"{site}.{kind}"].to(device) for kind in kinds})

    @cached_property
    def _kinds(self) -> dict[str, list[str]]:
        """The kinds of statistics of each site: a block of experts has too many to look for them each time."""
        found: dict[str, list[str]] = {}
        for name in self.tensors:
            site, _, kind = name.rpartition(".")
            found.setdefault(site, []).append(kind)
        return found

    def _site(self, linear: str) -> str:
        if linear not in self.sites:
            raise ModelError(f"{linear} was never reached by the calibration text: skip it or calibrate on more")
        return self.sites[linear]


# The statistics of blocks, given their indices in ascending order.
StatisticsOf = Callable[[Sequence[int]], Iterator[BlockStatistics]]


def stored_statistics(calibration: Artifact) -> StatisticsOf:
    """The statistics that a stage "calibrate" has stored."""
    return lambda indices: (BlockStatistics.read(calibration, index) for index in indices)


# Gets the index of a batch, and what a block outputs there.
UseOutput = Callable[[int, Tensor], None]


def observe_block(
    run: BlockRun,
    original: BlockRun | None,
    text: CalibrationText,
    statistics: Collection[Statistic],
    use_output: UseOutput | None = None,
    roundings: InputRoundings = NOT_ROUNDED,
    linears: Collection[str] | None = None,
) -> BlockStatistics:
    """The statistics of a block's linears, see `observe_parts`; those of several passes are on the CPU.

    There they are offloaded where they are too many.
    """
    offload, tensors, sites = run.hidden.offload, dict[str, Tensor](), dict[str, str]()
    for names, found in observe_parts(run, original, text, statistics, use_output, roundings, linears):
        is_all = len(names) == len(linears or block_linears(run.block))
        tensors |= found.tensors if is_all else {name: offload.kept(x.cpu()) for name, x in found.tensors.items()}
        sites |= found.sites
        del found
    return BlockStatistics(tensors, sites)


def observe_parts(
    run: BlockRun,
    original: BlockRun | None,
    text: CalibrationText,
    statistics: Collection[Statistic],
    use_output: UseOutput | None = None,
    roundings: InputRoundings = NOT_ROUNDED,
    linears: Collection[str] | None = None,
) -> Iterator[tuple[Collection[str], BlockStatistics]]:
    """The statistics of a block's linears on the hidden states that reach it: `ALWAYS`, and those asked for.

    Experts whose sums would fill a GPU are observed in several passes over the text: each yields its linears, by their
    names within the block, and their statistics on the device; what does not hold on to them holds one pass's alone.

    original: the original block on the original model's hidden states, for statistics of pairs of inputs and token
    weights; None where `run` is that. Batch by batch it is run first, and its hidden states stay its inputs.
    use_output: gets what `run` outputs, in the last pass; a pass whose outputs nobody gets ends at the last linear's
    input. roundings: of the inputs before anything is gathered from them, by linear of the block; both blocks run on
    inputs as they are. linears: those to gather from, by their names within the block; all by default.

    Raises ModelError, naming the linear, where an input is NaN or infinite, and for a block whose tokens cannot be
    weighted.
    """
    gathered = gathered_statistics(statistics)
    if original is None and any(statistic.needs_original for statistic in gathered):
        raise ValueError("a statistic of pairs of inputs needs the original block")
    passes = passes_of(run, linears or block_linears(run.block), gathered)
    for names in passes:
        used = use_output if names is passes[-1] else None
        yield names, _observe(run, original, text, gathered, used, roundings, names)


def _observe(
    run: BlockRun,
    original: BlockRun | None,
    text: CalibrationText,
    gathered: Sequence[Statistic],
    use_output: UseOutput | None,
    roundings: InputRoundings,
    names: Collection[str],
) -> BlockStatistics:
    """The statistics of the named linears, in one pass over the text."""
    paired, tokens = any(statistic.needs_original for statistic in gathered), text.windows_WT.numel()
    reference = OriginalBlock(original or run, paired, text.needs_original, text.weights_within(run.name))
    observers = [
        SiteObserver(gathered, tokens, text.error_tokens, run.device, run.hidden.offload, roundings) for _ in range(2)
    ]
    observer, of_experts = observers
    experts = ExpertObserver(run, original or run, text.experts, of_experts, names, tokens)
    watch = {name: partial(observer.see, name) for name in names if name not in experts.linears}
    observed = UntilCalled(run.block, [*watch, *experts.modules])
    for batch, windows in enumerate(run.hidden.batches):
        first_token = (run.hidden.first_window + windows.start) * text.windows_WT.shape[1]
        original_batch = reference.batch(batch)
        observer.begin_batch(first_token, original_batch)
        with watched_inputs(run.block, watch), experts.watching(first_token, original_batch):
            if use_output is None:
                observed.run(partial(run.output, batch))
            else:
                output_BTD = run.output(batch)
        if use_output is not None:
            use_output(batch, output_BTD)
    for one in observers:
        one.join(run.hidden.gang)
    experts.join(run.hidden.gang)
    tensors = {f"{run.name}.{name}": routed_E for name, routed_E in experts.complete().items()}
    sites: dict[str, str] = {}
    for one in observers:
        tensors |= _results(run, one)
        sites |= {f"{run.name}.{name}": f"{run.name}.{site}" for name, site in one.site_of.items()}
    return BlockStatistics(tensors, sites)


def _results(run: BlockRun, observer: SiteObserver) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    are_finite: dict[str, list[Tensor]] = {}
    for site, accumulators in observer.accumulators.items():
        full_name = f"{run.name}.{site}"
        for kind in list(accumulators):
            # Sums in float64 are dropped one by one: all of them beside all results may be more than a GPU holds.
            with phase("statistics"):
                tensor = accumulators.pop(kind).result()
            # The means are over all tokens, so that a sample need not be searched.
            if kind != Sample.kind:
                are_finite.setdefault(full_name, []).append(torch.isfinite(tensor).all())
            tensors[f"{full_name}.{kind}"] = run.hidden.offload.kept(tensor)
    _require_finite(run, are_finite)
    return tensors


def _require_finite(run: BlockRun, are_finite: Mapping[str, Sequence[Tensor]]) -> None:
    """Raise ModelError unless all of each site's answers are yes; they are asked for once, which waits for a GPU."""
    by_site = {site: torch.stack(tuple(answers)).all() for site, answers in are_finite.items()}
    answers = torch.stack([*by_site.values()]).tolist() if by_site else []
    for site, is_finite in zip(by_site, answers, strict=True):
        if not is_finite:
            dtype = str(run.hidden.states_WTD.dtype).removeprefix("torch.")
            raise ModelError(
                f"the calibration inputs of {site} hold NaN or infinities, although the weights are finite: "
                f"activations in {dtype} overflow; use another dtype"
            )


def gathered_statistics(requested: Collection[Statistic]) -> list[Statistic]:
    """`ALWAYS` and those requested, each once, in an order that does not depend on that of `requested`."""
    return [*ALWAYS, *sorted(set(requested) - set(ALWAYS), key=lambda statistic: statistic.kind)]
