"""AWQ: a scale per input channel, so that channels which carry large activations are rounded more finely.

For the linears of one input site and every ratio a (Lin et al., arXiv 2306.00978, section 3.2):

    m_i = mean over calibration tokens |x_i|                  c_i = max(m_i^a, 1e-4) / sqrt(max_j m_j^a · min_j m_j^a)
    error(a) = E ‖ f(x; W) - f(x; Q(W diag(c)) diag(c)⁻¹) ‖²

The best c stays in the weights and its inverse is folded into what makes the channels (`folding`), so that the block's
function is what it was. f is the closest module around all linears of the site: attention for q, k and v, the MLP for
gate and up, a single linear itself. One m is taken over all calibration text and one error over all of it.

Where a row feeds several channels (grouped queries before o_proj), those channels share one m, their mean, and so one
scale. A site that nothing can be folded into is left as it is.

Shapes: B sequences, T tokens, D hidden size, I input channels, O out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lqer.formats import NumberFormat

from .block_function import BlockFunction
from .folding import NO_ROW, Site, find_sites, fold_scale

# 1 itself is left out, as in AWQ's grid.
RATIOS = tuple(i / 20 for i in range(20))
SMALLEST_SCALE = 1e-4


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

    Channels without a row (NO_ROW) are zero and are not scaled; they get the mean of the others, lest they stretch c.
    """
    fed_I = rows_I != NO_ROW
    rows = int(rows_I.max()) + 1
    sums = mean_abs_I.new_zeros(rows).index_add_(0, rows_I[fed_I], mean_abs_I[fed_I])
    counts = mean_abs_I.new_zeros(rows).index_add_(0, rows_I[fed_I], torch.ones_like(mean_abs_I[fed_I]))
    tied_I = torch.full_like(mean_abs_I, float(mean_abs_I[fed_I].mean()))
    tied_I[fed_I] = (sums / counts)[rows_I[fed_I]]
    return tied_I


def search_scale(
    weights: Mapping[str, Tensor],
    mean_abs_I: Tensor,
    formats: Mapping[str, NumberFormat],
    error: Callable[[Mapping[str, Tensor]], float],
    ratios: Sequence[float] = RATIOS,
) -> tuple[Tensor, float, dict[float, float]]:
    """The scale (I,) of the smallest error, its ratio, and all errors; of equal errors the first wins.

    weights: (O, I) by name, all of one site; formats: theirs. `error` judges the weights as they act on the unscaled
    input, float32.
    """
    errors = {}
    for ratio in ratios:
        scale_I = scale_of(mean_abs_I, ratio)
        errors[ratio] = error(
            {name: formats[name].fake_quantize(weight.float() * scale_I) / scale_I for name, weight in weights.items()}
        )
    best = min(errors, key=errors.__getitem__)
    return scale_of(mean_abs_I, best), best, errors


@torch.no_grad()
def scale_block(
    call: BlockFunction,
    batches: Sequence[Tensor],
    formats: Mapping[str, NumberFormat],
    ratios: Sequence[float] = RATIOS,
) -> tuple[dict[str, Tensor], list[ScaledSite]]:
    """Search the scales of a block: the parameters that change (in their dtypes), and what was found for each site.

    batches: hidden states (B, T, D) of all calibration text, B and T as `call` was made for. formats: by name of the
    linear; a site with a linear that has none is left alone.
    """
    block = call.block
    parameters = {name: parameter.detach() for name, parameter in block.named_parameters()}
    changed: dict[str, Tensor] = {}
    found = []
    for site in find_sites(call, batches[0]):
        if site.fold is None or not all(name in formats for name in site.linears):
            continue
        around = _closest_around(site.linears)
        inspected = block.get_submodule(around)
        inputs, calls = _observe(call, batches, site.linears[0], inspected)
        mean_abs_I = tie(_mean_abs(inputs), site.fold.rows_I)
        error = _output_error(inspected, calls, prefix=f"{around}." if around else "")
        weights = {f"{name}.weight": parameters[f"{name}.weight"] for name in site.linears}
        weight_formats = {f"{name}.weight": formats[name] for name in site.linears}
        scale_I, ratio, errors = search_scale(weights, mean_abs_I, weight_formats, error, ratios)
        changed |= fold_scale(parameters | changed, site, scale_I)
        found.append(ScaledSite(site, scale_I, ratio, errors))
    return changed, found


def _closest_around(linears: tuple[str, ...]) -> str:
    """The name of the closest module around all of the linears; of a single one, its own."""
    if len(linears) == 1:
        return linears[0]
    paths = [name.split(".")[:-1] for name in linears]
    shared = 0
    while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return ".".join(paths[0][:shared])


@dataclass(frozen=True)
class _ModuleCall:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _observe(
    call: BlockFunction, batches: Sequence[Tensor], linear: str, inspected: nn.Module
) -> tuple[list[Tensor], list[_ModuleCall]]:
    """What reaches the linear, and how the inspected module is called, batch by batch."""
    inputs: list[Tensor] = []
    calls: list[_ModuleCall] = []
    hooks = [
        call.block.get_submodule(linear).register_forward_pre_hook(lambda _, args: inputs.append(args[0])),
        inspected.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append(_ModuleCall(args, kwargs)), with_kwargs=True
        ),
    ]
    try:
        for hidden_BTD in batches:
            call({}, hidden_BTD)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, calls


def _mean_abs(inputs: Sequence[Tensor]) -> Tensor:
    """Mean |x| per channel over all tokens, float32 (I,)."""
    sums = [x.reshape(-1, x.shape[-1]).abs().sum(0, dtype=torch.float64) for x in inputs]
    tokens = sum(x[..., 0].numel() for x in inputs)
    return (torch.stack(sums).sum(0) / tokens).to(torch.float32)


def _output_error(
    inspected: nn.Module, calls: Sequence[_ModuleCall], prefix: str
) -> Callable[[Mapping[str, Tensor]], float]:
    """The squared error of the module's output under other weights, summed over all calls."""
    own = {name: parameter.detach() for name, parameter in inspected.named_parameters()}

    def outputs(weights: Mapping[str, Tensor], called: _ModuleCall) -> Tensor:
        inside = {name: weight.to(own[name].dtype) for name, weight in weights.items()}
        output = functional_call(inspected, {**own, **inside}, called.args, called.kwargs)
        return (output[0] if isinstance(output, tuple) else output).float()

    originals = [outputs({}, called) for called in calls]

    def error(weights: Mapping[str, Tensor]) -> float:
        inside = {name.removeprefix(prefix): weight for name, weight in weights.items()}
        return sum(
            float((outputs(inside, called) - original).square().sum())
            for called, original in zip(calls, originals, strict=True)
        )

    return error
