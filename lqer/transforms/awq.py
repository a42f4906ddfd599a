"""AWQ: a scale per input channel, so that channels with large activations are rounded more finely.

For the linears of one input site and every ratio a (Lin et al., arXiv 2306.00978, section 3.2):

    m_i = mean over calibration tokens |x_i|                  c_i = max(m_i^a, 1e-4) / sqrt(max_j m_j^a · min_j m_j^a)
    error(a) = E ‖ f(x; W) - f(x; Q(W diag(c)) diag(c)⁻¹) ‖²

The best c is multiplied into the weights and its inverse is folded into the norm or linear before them (`folding`), so
the block's function does not change. f is the innermost module around all linears of the site: attention for q, k and
v, the MLP for gate and up, a single linear itself. m and the error are taken over the whole calibration text.

Where a row feeds several channels (grouped queries before o_proj), those channels share one m, their mean, and so one
scale. A site without a fold is left unscaled.

Shapes: B sequences, T tokens, D hidden size, I input channels, O out_features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from lqer.components import require_positive
from lqer.formats import NumberFormat
from lqer.transforms.block_function import BlockFunction
from lqer.transforms.block_problem import BlockProblem
from lqer.transforms.block_result import BlockResult
from lqer.transforms.block_transform import BlockTransform, Progress, SaveState
from lqer.transforms.folding import NO_ROW, Site, find_sites, fold_scale
from lqer.transforms.tracing import watched_inputs

# Without 1 itself, as in AWQ's grid.
RATIOS = tuple(i / 20 for i in range(20))
SMALLEST_SCALE = 1e-4


@dataclass(frozen=True)
class Awq(BlockTransform):
    """`awq` as a configuration names it: a grid of `ratios` ratios from 0, compared on `samples` sequences."""

    kind = "awq"

    ratios: int = len(RATIOS)
    samples: int = 128

    def __post_init__(self) -> None:
        require_positive("ratios", self.ratios, self.kind)
        require_positive("samples", self.samples, self.kind)

    def apply(
        self, problem: BlockProblem, result: BlockResult, progress: Progress, save_state: SaveState
    ) -> BlockResult:
        """Scale every input site that its scale can be folded into. Raises ValueError after another transform."""
        if result.parameters or result.rounded:
            raise ValueError("awq must be the first transform of a block")
        progress(self.kind, 0, 1, None)
        ratios = [i / self.ratios for i in range(self.ratios)]
        batches = problem.inputs_STD[: self.samples].split(problem.batch_size)
        changed, found = scale_block(
            problem.call.without_rounding(), batches, problem.formats, ratios, problem.autocast
        )
        # Later parts must see norms as the checkpoint stores them.
        stored = problem.in_stored_dtypes(changed)
        return replace(result, parameters=stored).with_note(
            self.kind, {site.site.linears[0]: site.ratio for site in found}
        )


@dataclass(frozen=True)
class ScaledSite:
    """A site, its scale (float32 (I,)), the ratio it came from, and the error of every ratio tried."""

    site: Site
    scale_I: Tensor
    ratio: float
    errors: dict[float, float]


def scale_of(mean_abs_I: Tensor, ratio: float) -> Tensor:
    """The c of the module's docstring, float32. Ratio 0 gives exact ones."""
    scale_I = mean_abs_I.to(torch.float32).pow(ratio).clamp_(min=SMALLEST_SCALE)
    return scale_I / (scale_I.max() * scale_I.min()).sqrt()


def tie(mean_abs_I: Tensor, rows_I: Tensor) -> Tensor:
    """The mean of the channels that share a row, for each of them.

    Channels without a row (NO_ROW) are zero and are not scaled; they get the mean of the others, so that they do not
    widen the range of c.
    """
    fed_I = rows_I != NO_ROW
    rows = int(rows_I.max()) + 1
    sums = mean_abs_I.new_zeros(rows).index_add_(0, rows_I[fed_I], mean_abs_I[fed_I])
    counts = mean_abs_I.new_zeros(rows).index_add_(0, rows_I[fed_I], torch.ones_like(mean_abs_I[fed_I]))
    tied_I = torch.full_like(mean_abs_I, float(mean_abs_I[fed_I].mean()))
    tied_I[fed_I] = (sums / counts)[rows_I[fed_I]]
    return tied_I


def candidates(
    weights: Mapping[str, Tensor],
    mean_abs_I: Tensor,
    formats: Mapping[str, NumberFormat],
    ratios: Sequence[float],
) -> Iterator[dict[str, Tensor]]:
    """For every ratio the weights rounded under its scale, with the scale divided out again: float32.

    weights: (O, I), all of one site, by name. formats: of the same names.
    """
    for ratio in ratios:
        scale_I = scale_of(mean_abs_I, ratio)
        yield {
            name: formats[name].fake_quantize(weight_OI.float() * scale_I) / scale_I
            for name, weight_OI in weights.items()
        }


@torch.no_grad()
def scale_block(
    call: BlockFunction,
    batches: Sequence[Tensor],
    formats: Mapping[str, NumberFormat],
    ratios: Sequence[float] = RATIOS,
    autocast: torch.dtype | None = None,
) -> tuple[dict[str, Tensor], list[ScaledSite]]:
    """Search the scales of a block: the parameters that change (in their dtypes), and the scale found for each site.

    batches: hidden states (B, T, D) of the whole calibration text on any device, of a B and T that `call` accepts.
    formats: by name of the linear; a site with a linear that has none is skipped. autocast: the dtype of the products
    while candidates are compared. Memory: the activations of one batch in the block.
    """
    block = call.block
    parameters = {name: parameter.detach() for name, parameter in block.named_parameters()}
    device = next(iter(parameters.values())).device
    changed: dict[str, Tensor] = {}
    found = []
    sites = find_sites(call, batches[0])
    scaled = [site for site in sites if site.fold is not None and all(name in formats for name in site.linears)]
    means = mean_magnitudes(call, batches, [site.linears[0] for site in scaled])
    for site in scaled:
        assert site.fold is not None
        mean_abs_I = tie(means[site.linears[0]], site.fold.rows_I)
        weights = {f"{name}.weight": parameters[f"{name}.weight"] for name in site.linears}
        weight_formats = {f"{name}.weight": formats[name] for name in site.linears}
        errors = torch.zeros(len(ratios), dtype=torch.float64, device=device)
        for hidden_BTD in batches:
            inspected = _Inspected(call, hidden_BTD, _closest_around(site.linears), autocast)
            for k, rounded in enumerate(candidates(weights, mean_abs_I, weight_formats, ratios)):
                errors[k] += inspected.error(rounded)
        by_ratio = dict(zip(ratios, errors.tolist(), strict=True))
        # Of equal errors the first wins.
        ratio = min(by_ratio, key=by_ratio.__getitem__)
        scale_I = scale_of(mean_abs_I, ratio)
        changed |= fold_scale(parameters | changed, site, scale_I)
        found.append(ScaledSite(site, scale_I, ratio, by_ratio))
    return changed, found


@torch.no_grad()
def mean_magnitudes(call: BlockFunction, batches: Sequence[Tensor], linears: Sequence[str]) -> dict[str, Tensor]:
    """Mean |x| of every input channel over all tokens, float32 (I,), of the linears of these names."""
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        sum_I = x.detach().abs().flatten(0, -2).sum(0, dtype=torch.float64)
        sums[name] = sums[name] + sum_I if name in sums else sum_I

    with watched_inputs(call.block, {name: partial(add, name) for name in linears}):
        for hidden_BTD in batches:
            call({}, hidden_BTD)
    tokens = sum(hidden_BTD.shape[0] * hidden_BTD.shape[1] for hidden_BTD in batches)
    return {name: (sum_I / tokens).to(torch.float32) for name, sum_I in sums.items()}


def _closest_around(linears: tuple[str, ...]) -> str:
    """The name of the innermost module around all of the linears; the linear itself if there is one."""
    if len(linears) == 1:
        return linears[0]
    paths = [name.split(".")[:-1] for name in linears]
    shared = 0
    while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return ".".join(paths[0][:shared])


class _Inspected:
    """The module that a site's error is measured at, called as the block calls it on one batch."""

    def __init__(self, call: BlockFunction, hidden_BTD: Tensor, name: str, autocast: torch.dtype | None):
        self._module = call.block.get_submodule(name)
        self._prefix = f"{name}." if name else ""
        self._own = {name: parameter.detach() for name, parameter in self._module.named_parameters()}
        self._autocast = autocast
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        handle = self._module.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        try:
            with self._in_autocast():
                call({}, hidden_BTD)
        finally:
            handle.remove()
        ((self._args, self._kwargs),) = calls
        self._original = self._output({})

    def error(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The squared error of the output under other weights, by their names in the block: a float32 scalar."""
        inside = {name.removeprefix(self._prefix): weight for name, weight in weights.items()}
        return (self._output(inside) - self._original).square().sum()

    def _output(self, weights: Mapping[str, Tensor]) -> Tensor:
        inside = {name: weight.to(self._own[name].dtype) for name, weight in weights.items()}
        with self._in_autocast():
            output = functional_call(self._module, {**self._own, **inside}, self._args, self._kwargs)
        return (output[0] if isinstance(output, tuple | list) else output).float()

    def _in_autocast(self) -> torch.autocast:
        device = next(iter(self._own.values())).device
        return torch.autocast(device.type, self._autocast, enabled=self._autocast is not None)
