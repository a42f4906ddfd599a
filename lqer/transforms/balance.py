"""Balanced columns: a scale per input channel, so that columns share their group's step by what errors cost.

A group of columns has one step, about proportional to the root of the group's energy. With scales c_j > 0 that are
folded out of the inputs (`folding`), column j of W diag(c) has the energy c_j² σ_j², and an error of it costs
D_j / c_j². The expected error of a group is, up to a constant,

    (Σ_j c_j² σ_j²) (Σ_j D_j / c_j²)  ≥  (Σ_j σ_j √D_j)²        equal where c_j⁴ = D_j / σ_j²  (Cauchy-Schwarz)

    σ_j² = Σ_o W_oj²  over the rows of the linears that read the inputs        D_j = 1 / U_jj², the weight that error
    c_j  = (D_j / σ_j²)^(strength / 4), of geometric mean 1, clamped           feedback has (rounding/factor.py has U)

so that one closed form serves groups of every size. A strength of 1 is that optimum. A step grows with the largest
value of a group, which a scaled column may become: hence less, and a limit.

The scale goes into the rows of the linear that makes the inputs (up before down, v before o), which have steps of their
own. Norms take none: behind a rotated residual stream columns are alike, and a gain in half precision would not undo
the scale. Channels that one row feeds (grouped queries) share one c, of their mean D and σ²; a row feeds every channel.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lqer.components import require_number
from lqer.formats.blocks import BlockSize
from lqer.rounding.base import require_damping
from lqer.rounding.factor import inverse_factor
from lqer.rounding.hessian import DAMPING, DampedHessian
from lqer.transforms.block_problem import BlockProblem
from lqer.transforms.block_result import BlockResult
from lqer.transforms.block_statistics import hessian_blocks
from lqer.transforms.block_transform import BlockTransform, Progress, SaveState
from lqer.transforms.folding import NO_ROW, find_sites, fold_scale, tied
from lqer.transforms.tracing import enough_to_probe


@dataclass(frozen=True)
class Balance(BlockTransform):
    """`balance` as a configuration names it. limit: the largest c, and the inverse of the smallest."""

    kind = "balance"

    strength: float = 0.5
    limit: float = 2.0
    damping: float = DAMPING

    def __post_init__(self) -> None:
        require_number("strength", self.strength, self.kind)
        require_number("limit", self.limit, self.kind)
        require_damping(self.damping, self.kind)
        if self.limit < 1:
            raise ValueError(f"limit {self.limit!r} is below 1 ({self.kind})")

    @torch.no_grad()
    def apply(
        self, problem: BlockProblem, result: BlockResult, progress: Progress, save_state: SaveState
    ) -> BlockResult:
        """Scale the inputs that a linear makes. Raises ValueError after rounding."""
        if result.rounded:
            raise ValueError("balance must come before transforms that fix scales")
        progress(self.kind, 0, 1, None)
        call = problem.call.without_rounding()
        sites = [
            (site, site.fold)
            for site in find_sites(call, enough_to_probe(problem.inputs_STD[: problem.batch_size]))
            if site.fold is not None
            and isinstance(call.block.get_submodule(site.fold.source), nn.Linear)
            and all(linear in problem.formats for linear in site.linears)
        ]
        whole: dict[str, BlockSize] = {site.linears[0]: "row" for site, _ in sites}
        squares = hessian_blocks(problem, result.parameters, whole)
        parameters = {name: parameter.detach() for name, parameter in call.block.named_parameters()}
        changed, ranges = dict(result.parameters), {}
        for site, fold in sites:
            weights = [(parameters | changed)[f"{linear}.weight"] for linear in site.linears]
            hessian_II = squares.pop(site.linears[0]).squeeze(0)
            scale_I = balanced_scale(weights, hessian_II, fold.rows_I, self.strength, self.limit, self.damping)
            changed |= fold_scale(parameters | changed, site, scale_I)
            ranges[site.linears[0]] = [float(scale_I.min()), float(scale_I.max())]
        return replace(result, parameters=problem.in_stored_dtypes(changed)).with_note(self.kind, ranges)


def balanced_scale(
    weights: Sequence[Tensor],
    hessian_II: Tensor,
    rows_I: Tensor,
    strength: float,
    limit: float,
    damping: float = DAMPING,
) -> Tensor:
    """The c of the module's docstring, float32 (I,), equal on channels that share a row.

    weights: (O, I) each, of the linears that read the inputs. hessian_II: Σ x xᵀ of these up to scale. rows_I: the row
    that feeds each channel; channels without one, without weights or that are always zero get 1.
    """
    energy_I = torch.stack([weight_OI.to(torch.float64).square().sum(0) for weight_OI in weights]).sum(0)
    damped = DampedHessian(hessian_II, damping)
    cost_I = inverse_factor(damped).diagonal().pow(-2)
    tied_cost_I, tied_energy_I = tied(cost_I, rows_I), tied(energy_I, rows_I)
    is_scaled_I = (rows_I != NO_ROW) & (tied_energy_I > 0) & ~damped.dead_I
    log_I = torch.where(is_scaled_I, tied_cost_I / tied_energy_I, 1.0).log() * (strength / 4)
    log_I = torch.where(is_scaled_I, log_I - log_I[is_scaled_I].mean(), 0.0)
    return log_I.exp().clamp(1 / limit, limit).to(torch.float32)
