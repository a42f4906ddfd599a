"""AWQ: a scale per input channel, so that channels with large activations are rounded more finely.

For the linears of one input site and every ratio a (Lin et al., arXiv 2306.00978, section 3.2):

    m_i = mean over calibration tokens |x_i|                  w_i = mean over rows o  |W_oi| / max over i's group |W_oj|
    b_i = m_i^a                                               b_i = m_i^a / (w_i^(1-a) + 1e-4)   with duo scaling
    c_i = max(b_i, 1e-4), divided by sqrt(max_j c_j · min_j c_j)
    error(a) = E ‖ f(x; W) - f(x; Q(W diag(c)) diag(c)⁻¹) ‖²

The best c is multiplied into the weights and its inverse is folded into the norm or linear before them (`folding`), so
the block's function does not change. f is the innermost module around all linears of the site: attention for q, k and
v, the MLP for gate and up, a single linear itself. Duo scaling is the form of the authors' code; c = 1 (RTN), which
b = m^a contains as a = 0, is then tried too.

m is taken over the whole calibration text. The error is compared on whole windows, evenly spaced, that hold a given
number of tokens: few tokens determine the one ratio of a site (docs/methods/tesseraq.md).

Where a row feeds several channels (grouped queries before o_proj), those channels share one m and one w, their means,
and so one scale. A site without a fold is left unscaled.

Shapes: S sequences, B sequences of a batch, T tokens, D hidden size, I input channels, O out_features,
G groups of a row, g channels of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lqer.components import require_choice, require_positive
from lqer.formats import NumberFormat
from lqer.formats.blocks import BlockSize, from_blocks, scale_groups, to_blocks
from lqer.lowrank.precision import tensor_core_float32
from lqer.statistics import ALONE, Gang
from lqer.transforms.block_function import BlockFunction
from lqer.transforms.block_problem import BlockProblem
from lqer.transforms.block_result import BlockResult
from lqer.transforms.block_statistics import mean_magnitudes
from lqer.transforms.block_transform import BlockTransform, Progress, SaveState
from lqer.transforms.folding import Site, find_sites, fold_scale, tied
from lqer.transforms.site_output import SiteOutput
from lqer.transforms.tracing import enough_to_probe

# Without 1 itself, as in AWQ's grid.
RATIOS = tuple(i / 20 for i in range(20))
SMALLEST_SCALE = 1e-4


@dataclass(frozen=True)
class Awq(BlockTransform):
    """`awq` as a configuration names it: a grid of `ratios` ratios from 0.

    samples: sequences that mean magnitudes are taken over. rows: tokens that errors are compared on, rounded up to
    whole sequences of those. duo_scaling: divide by the weights' magnitude too.
    """

    kind = "awq"

    ratios: int = len(RATIOS)
    samples: int = 128
    rows: int = 512
    duo_scaling: bool = False

    def __post_init__(self) -> None:
        require_positive("ratios", self.ratios, self.kind)
        require_positive("samples", self.samples, self.kind)
        require_positive("rows", self.rows, self.kind)
        require_choice("duo_scaling", self.duo_scaling, (False, True), self.kind)

    def apply(
        self, problem: BlockProblem, result: BlockResult, progress: Progress, save_state: SaveState
    ) -> BlockResult:
        """Scale every input site that its scale can be folded into. Raises ValueError after another transform."""
        if result.parameters or result.rounded:
            raise ValueError("awq must be the first transform of a block")
        progress(self.kind, 0, 1, None)
        ratios = [i / self.ratios for i in range(self.ratios)]
        inputs_STD = problem.inputs_STD[: self.samples]
        changed, found = scale_block(
            problem.call.without_rounding(),
            inputs_STD.split(problem.batch_size),
            evenly_spaced(inputs_STD, self.rows).split(problem.batch_size),
            problem.formats,
            ratios,
            self.duo_scaling,
            problem.autocast,
            problem.gang,
        )
        # Later parts must see norms as the checkpoint stores them.
        stored = problem.in_stored_dtypes(changed)
        return replace(result, parameters=stored).with_note(
            self.kind, {site.site.linears[0]: site.ratio for site in found}
        )


@dataclass(frozen=True)
class ScaledSite:
    """A site, its scale (float32 (I,)), the ratio it came from, and the error of every ratio tried.

    The ratio None is the scale 1 that duo scaling adds.
    """

    site: Site
    scale_I: Tensor
    ratio: float | None
    errors: dict[float | None, float]


def scale_of(mean_abs_I: Tensor, ratio: float) -> Tensor:
    """The c of the module's docstring for b = m^a, float32. Ratio 0 gives exact ones."""
    return _balanced(mean_abs_I.to(torch.float32).pow(ratio))


def duo_scale_of(mean_abs_I: Tensor, weight_magnitude_I: Tensor, ratio: float) -> Tensor:
    """The c of the module's docstring with duo scaling, float32. weight_magnitude_I: its w."""
    divisor_I = weight_magnitude_I.to(torch.float32).pow(1 - ratio) + SMALLEST_SCALE
    return _balanced(mean_abs_I.to(torch.float32).pow(ratio) / divisor_I)


def candidate_scales(mean_abs_I: Tensor, ratios: Sequence[float]) -> dict[float | None, Tensor]:
    """The scale of every ratio."""
    return {ratio: scale_of(mean_abs_I, ratio) for ratio in ratios}


def duo_candidate_scales(
    mean_abs_I: Tensor, weight_magnitude_I: Tensor, ratios: Sequence[float]
) -> dict[float | None, Tensor]:
    """The scale of every ratio with duo scaling, after the scale 1, which no ratio gives."""
    scales: dict[float | None, Tensor] = {None: torch.ones_like(mean_abs_I)}
    return scales | {ratio: duo_scale_of(mean_abs_I, weight_magnitude_I, ratio) for ratio in ratios}


def _balanced(scale_I: Tensor) -> Tensor:
    scale_I = scale_I.clamp(min=SMALLEST_SCALE)
    return scale_I / (scale_I.max() * scale_I.min()).sqrt()


def weight_magnitudes(weights: Sequence[Tensor], block_sizes: Sequence[BlockSize]) -> Tensor:
    """The w of the module's docstring: float32 (I,), the mean over the rows of all weights (O, I) of one site."""
    relative = []
    for weight_OI, block_size in zip(weights, block_sizes, strict=True):
        magnitude_OGg = to_blocks(weight_OI.to(torch.float32).abs(), block_size)
        largest_OG1 = scale_groups(magnitude_OGg, block_size).amax(-1, keepdim=True)
        # A group of zeros has no largest value to be relative to: it stays zero.
        relative_OGg = magnitude_OGg / torch.where(largest_OG1 > 0, largest_OG1, 1.0)
        relative.append(from_blocks(relative_OGg, weight_OI.shape[1]))
    return torch.cat(relative).mean(0)


def evenly_spaced(inputs_STD: Tensor, rows: int) -> Tensor:
    """The fewest whole sequences, evenly spaced, that hold `rows` tokens; all of them if they hold fewer."""
    sequences, tokens = inputs_STD.shape[:2]
    count = min(sequences, -(-rows // tokens))
    return inputs_STD[torch.arange(count, device=inputs_STD.device) * sequences // count]


def round_scaled(
    weights: Mapping[str, Tensor], scale_I: Tensor, formats: Mapping[str, NumberFormat]
) -> dict[str, Tensor]:
    """The weights (O, I) rounded under a scale, with the scale divided out again: float32, by the same names."""
    return {
        name: formats[name].fake_quantize(weight_OI.float() * scale_I) / scale_I for name, weight_OI in weights.items()
    }


@torch.no_grad()
def scale_block(
    call: BlockFunction,
    batches: Sequence[Tensor],
    searched: Sequence[Tensor],
    formats: Mapping[str, NumberFormat],
    ratios: Sequence[float] = RATIOS,
    duo_scaling: bool = False,
    autocast: torch.dtype | None = None,
    gang: Gang = ALONE,
) -> tuple[dict[str, Tensor], list[ScaledSite]]:
    """Search the scales of a block: the parameters that change (in their dtypes), and the scale found for each site.

    batches: hidden states (B, T, D) of the whole calibration text on any device; `call` must accept any B of that T.
    searched: those that errors are compared on. formats: by name of the linear; a site with a linear that has none is
    skipped. autocast: the dtype of the products where candidates are compared; means are taken in float32, on a GPU by
    its tensor cores (TF32). gang: shares out the batches. Memory: the activations of one batch in the block.
    """
    block = call.block
    parameters = {name: parameter.detach() for name, parameter in block.named_parameters()}
    changed: dict[str, Tensor] = {}
    found = []
    sites = find_sites(call, enough_to_probe(batches[0]))
    scaled = [site for site in sites if site.fold is not None and all(name in formats for name in site.linears)]
    # Not in bfloat16: the ratio of a site, and where its weights are rounded to, hang on the last digits of the means.
    with tensor_core_float32(next(block.parameters()).device):
        means = mean_magnitudes(call, batches, [site.linears[0] for site in scaled], gang)
    # Probing shuffles the tokens: they may reach an expert that none reaches in their order.
    for site in (site for site in scaled if site.linears[0] in means):
        weights = {f"{name}.weight": parameters[f"{name}.weight"] for name in site.linears}
        weight_formats = {f"{name}.weight": formats[name] for name in site.linears}
        scales = _candidates(site, means[site.linears[0]], weights, weight_formats, ratios, duo_scaling)
        search = partial(_errors, call, site, [*scales.values()], weights, weight_formats, autocast)
        errors = torch.zeros(len(scales), dtype=torch.float64, device=means[site.linears[0]].device)
        for of_batch in gang.each(searched, search):
            errors += of_batch
        by_ratio = dict(zip(scales, errors.tolist(), strict=True))
        # Among equal errors the first wins.
        ratio = min(by_ratio, key=by_ratio.__getitem__)
        changed |= fold_scale(parameters | changed, site, scales[ratio])
        found.append(ScaledSite(site, scales[ratio], ratio, by_ratio))
    return changed, found


def _candidates(
    site: Site,
    mean_abs_I: Tensor,
    weights: Mapping[str, Tensor],
    formats: Mapping[str, NumberFormat],
    ratios: Sequence[float],
    duo_scaling: bool,
) -> dict[float | None, Tensor]:
    """The scales that are tried at a site, by ratio; channels that its fold ties share one."""
    assert site.fold is not None, "a site without a fold is not scaled"
    mean_abs_I = tied(mean_abs_I, site.fold.rows_I)
    if not duo_scaling:
        return candidate_scales(mean_abs_I, ratios)
    magnitude_I = weight_magnitudes([*weights.values()], [formats[name].block_size for name in weights])
    return duo_candidate_scales(mean_abs_I, tied(magnitude_I, site.fold.rows_I), ratios)


def _errors(
    call: BlockFunction,
    site: Site,
    scales: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    formats: Mapping[str, NumberFormat],
    autocast: torch.dtype | None,
    hidden_BTD: Tensor,
) -> Tensor:
    """The squared error of the site's output on one batch under each scale, float32."""
    output = SiteOutput(call, hidden_BTD, site.linears, autocast)
    errors = [output.error(round_scaled(weights, scale_I, formats)) for scale_I in scales]
    return torch.stack([error.to(scales[0].device) for error in errors])
