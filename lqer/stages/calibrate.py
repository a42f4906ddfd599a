"""Stage "calibrate": what is known of the inputs of every linear, one safetensors file per decoder block.

Linears fed by the same tensor (q, k and v; gate and up) form one input site and share its statistics. A file holds, for
each site named after its first linear,
    <site>.mean_abs     (I,)    float32, maximum over batches of the mean of |x_i| over a batch's tokens (LQER)
    <site>.mean_square  (I,)    float32, mean of x_i² over all tokens
    <site>.sample       (S, I)  inputs of S tokens spread evenly over the text, to report output errors on
where a method or a rounding asks for it
    <site>.max_abs          (I,)    float32, largest |x_i| over all tokens
    <site>.autocorrelation  (I, I)  float32, mean of x xᵀ over all tokens, not centred
and in `sites.json` which site each linear belongs to.

Shapes: W windows, T tokens of a window, N tokens of a batch, I in_features, S sampled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lqer.data.datasets import tokens_sha256
from lqer.errors import ModelError
from lqer.lowrank.precision import full_float32
from lqer.models.loaders import OpenedModel
from lqer.models.structure import block_linears
from lqer.models.walker import BlockRun, walk_blocks
from lqer.store.names import SITES_FILE, block_file
from lqer.store.offload import Offload
from lqer.store.store import Artifact, Workspace

# Raised whenever the same inputs would give other statistics than before.
CALIBRATE_VERSION = 3


# Statistics that are gathered only when asked for; the others cost next to nothing.
ON_REQUEST = frozenset({"max_abs", "autocorrelation"})
# Tokens whose products are summed in float32 before the sum goes into a float64 one.
CHUNK_TOKENS = 512
PANEL_ROWS = 512


class SiteStatistics:
    """Accumulates the statistics of one input site over the batches of the calibration text.

    requested: members of ON_REQUEST to gather in addition. Accumulators come from `offload`, which puts large ones on
    disk within the memory budget.
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device,
        requested: Collection[str] = (),
        offload: Offload | None = None,
    ):
        offload = offload or Offload()
        self.mean_abs_I = offload.zeros([in_features], torch.float32, device)
        self.square_sum_I = offload.zeros([in_features], torch.float64, device)
        self.tokens = 0
        self.sample_SI: list[Tensor] = []
        self.max_abs_I = torch.zeros(in_features, device=device) if "max_abs" in requested else None
        self.product_sum_II: Tensor | None = None
        if "autocorrelation" in requested:
            self.product_sum_II = offload.zeros([in_features, in_features], torch.float64, device)

    def add(self, x_NI: Tensor, sampled_N: Tensor) -> None:
        """Take in a batch: x_NI inputs, sampled_N the indices of the tokens to keep."""
        x32_NI = x_NI.to(torch.float32)
        # Two passes each, and still several times faster than a vector norm down the columns.
        self.mean_abs_I = torch.maximum(self.mean_abs_I, x32_NI.abs().mean(0))
        self.square_sum_I += x32_NI.square().sum(0).to(torch.float64)
        self.tokens += len(x_NI)
        self.sample_SI.append(x_NI[sampled_N].cpu())
        if self.max_abs_I is not None:
            self.max_abs_I = torch.maximum(self.max_abs_I, x32_NI.abs().amax(0))
        if self.product_sum_II is not None:
            for chunk_NI in x_NI.split(CHUNK_TOKENS):
                _add(self.product_sum_II, products(chunk_NI))

    def tensors(self) -> dict[str, Tensor]:
        tensors = {
            "mean_abs": self.mean_abs_I,
            "mean_square": (self.square_sum_I / self.tokens).to(torch.float32),
            "sample": torch.cat(self.sample_SI),
        }
        if self.max_abs_I is not None:
            tensors["max_abs"] = self.max_abs_I
        if self.product_sum_II is not None:
            tensors["autocorrelation"] = _symmetric_mean(self.product_sum_II, self.tokens)
        return tensors


def _add(sum_II: Tensor, products_II: Tensor) -> None:
    """Add float32 to float64 in place; by panels of rows, since a CPU widens all that it adds beforehand."""
    for sum_PI, products_PI in zip(sum_II.split(PANEL_ROWS), products_II.split(PANEL_ROWS), strict=True):
        sum_PI += products_PI


def _symmetric_mean(sum_II: Tensor, count: int) -> Tensor:
    """(S + Sᵀ) / 2 count, float32: a matrix product need not be symmetric to the last bit.

    By panels of rows: a second matrix in float64 would be more than a large block's weights.
    """
    mean_II = torch.empty(sum_II.shape, dtype=torch.float32, device=sum_II.device)
    for first in range(0, len(sum_II), PANEL_ROWS):
        rows = slice(first, first + PANEL_ROWS)
        mean_II[rows] = (sum_II[rows] + sum_II[:, rows].T) / (2 * count)
    return mean_II


def products(x_NI: Tensor) -> Tensor:
    """Σ x xᵀ, float32 (I, I), without TF32.

    Products of two bfloat16 or float16 numbers are exact in float32, where a GPU's half-precision units add them up.
    """
    if x_NI.is_cuda and x_NI.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x_NI.T, x_NI, out_dtype=torch.float32)
    x32_NI = x_NI.to(torch.float32)
    with full_float32():
        return x32_NI.T @ x32_NI


class BlockObserver:
    """Hooks on the linears of one block: finds which of them share an input and feeds each site's statistics."""

    def __init__(
        self,
        linears: dict[str, nn.Linear],
        tokens: int,
        sampled: int,
        device: torch.device,
        requested: Collection[str] = (),
        offload: Offload | None = None,
    ):
        self.sites: dict[str, SiteStatistics] = {}
        self.site_of: dict[str, str] = {}
        self._tokens, self._sampled, self._device, self._requested = tokens, sampled, device, requested
        self._spill = offload or Offload()
        self._last_input: Tensor | None = None
        self._last_version = 0
        self._last_site = ""
        self._first_token = 0
        # The sampled tokens of a batch are the same at every site: (first token, count) and their indices.
        self._sampled_of = (-1, 0)
        self._sampled_N = torch.empty(0, dtype=torch.int64)
        self._hooks = [
            linear.register_forward_pre_hook(lambda _, args, name=name: self._observe(name, args[0]))
            for name, linear in linears.items()
        ]

    def begin_batch(self, first_token: int) -> None:
        self._first_token = first_token

    def _observe(self, name: str, x: Tensor) -> None:
        # Linears that share an input are called one after the other with the very same tensor, unchanged in between.
        if x is self._last_input and x._version == self._last_version:
            self.site_of.setdefault(name, self._last_site)
            return
        site = self.site_of.setdefault(name, name)
        self._last_input, self._last_version, self._last_site = x, x._version, site
        x_NI = x.reshape(-1, x.shape[-1])
        if site not in self.sites:
            self.sites[site] = SiteStatistics(x.shape[-1], self._device, self._requested, self._spill)
        statistics = self.sites[site]
        if self._sampled_of != (self._first_token, len(x_NI)):
            self._sampled_of = (self._first_token, len(x_NI))
            self._sampled_N = spread_indices(*self._sampled_of, self._tokens, self._sampled).to(x.device)
        statistics.add(x_NI, self._sampled_N)

    def close(self) -> None:
        self._last_input = None
        for hook in self._hooks:
            hook.remove()


def spread_indices(first_token: int, count: int, tokens: int, sampled: int) -> Tensor:
    """Which of the `count` tokens from first_token on are among the `sampled` ones spread evenly over all `tokens`.

    The choice depends on a token's place in the whole text alone, so it is the same for every batch size.
    """
    sampled = min(sampled, tokens)
    indices = torch.arange(sampled) * tokens // sampled - first_token
    return indices[(indices >= 0) & (indices < count)]


@dataclass(frozen=True)
class CalibrationText:
    """The windows that statistics are gathered on: int64 token ids, and how many windows make a micro-batch.

    error_tokens: how many of the tokens each site keeps its inputs of.
    """

    windows_WT: Tensor
    batch_size: int
    error_tokens: int


@dataclass(frozen=True)
class BlockStatistics:
    """What is known of the inputs of one block's linears, and which site each of them belongs to, by full names."""

    tensors: Mapping[str, Tensor]
    sites: Mapping[str, str]

    @classmethod
    def read(cls, calibration: Artifact, index: int) -> BlockStatistics:
        return cls(calibration.tensors(block_file(index)), calibration.json(SITES_FILE))

    def to(self, device: torch.device) -> BlockStatistics:
        return BlockStatistics({name: tensor.to(device) for name, tensor in self.tensors.items()}, self.sites)

    def of(self, linear: str) -> dict[str, Tensor]:
        """A linear's statistics by their own names. Raises ModelError if the calibration text never reached it."""
        if linear not in self.sites:
            raise ModelError(f"{linear} was never reached by the calibration text: skip it or calibrate on more")
        prefix = f"{self.sites[linear]}."
        return {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}


def calibrate(
    workspace: Workspace, opened: OpenedModel, text: CalibrationText, requested: Collection[str] = ()
) -> None:
    """Gather the statistics of every block that `workspace` does not hold yet.

    requested: statistics of ON_REQUEST, of which one block's are in memory at a time. Raises ModelError, naming the
    linear, where an input is NaN or infinite.
    """
    sites: dict[str, str] = workspace.json(SITES_FILE) if SITES_FILE in workspace else {}
    visits = walk_blocks(opened, text.windows_WT, text.batch_size)
    for visit in tqdm(visits, total=len(opened.blocks), desc="calibrate", unit="block"):
        if block_file(visit.index) in workspace:
            visit.forward()
            continue
        found = observe_block(visit, visit.forward, text, requested)
        sites.update(found.sites)
        # The table first: a block whose file is there is then sure to be in it.
        workspace.write_json(SITES_FILE, sites)
        workspace.write_tensors(block_file(visit.index), found.tensors)
        # Else one block's statistics would be held beside the next one's.
        del found


def observe_block(
    visit: BlockRun,
    run: Callable[[Callable[[int], None]], None],
    text: CalibrationText,
    requested: Collection[str] = (),
) -> BlockStatistics:
    """The statistics of a block's linears while `run`, one of the visit's own ways, takes the text through it."""
    windows_WT, device, offload = text.windows_WT, visit.device, visit.stream.offload
    observer = BlockObserver(
        block_linears(visit.block), windows_WT.numel(), text.error_tokens, device, requested, offload
    )
    try:
        run(lambda first_window: observer.begin_batch(first_window * windows_WT.shape[1]))
    finally:
        observer.close()
    tensors: dict[str, Tensor] = {}
    for site, statistics in observer.sites.items():
        full_name = f"{visit.name}.{site}"
        for key, tensor in statistics.tensors().items():
            if not torch.isfinite(tensor).all():
                raise ModelError(f"the calibration inputs of {full_name} hold NaN or infinities (dtype {tensor.dtype})")
            tensors[f"{full_name}.{key}"] = tensor
    sites = {f"{visit.name}.{name}": f"{visit.name}.{site}" for name, site in observer.site_of.items()}
    return BlockStatistics(tensors, sites)


def calibration_key(
    model_fingerprint: str, text: CalibrationText, dtype: Any, device: torch.device, requested: Collection[str] = ()
) -> dict[str, Any]:
    """What decides the outcome: the weights, the token ids, the micro-batch, the arithmetic, what was asked for."""
    return {
        "version": CALIBRATE_VERSION,
        "model": model_fingerprint,
        "tokens": tokens_sha256(text.windows_WT),
        "batch_size": text.batch_size,
        "error_tokens": text.error_tokens,
        "dtype": str(dtype),
        "device": device.type,
        "requested": sorted(requested),
    }
