"""LDLQ: error feedback by a block LDL decomposition, also for vector codes (QuIP#, arXiv 2402.04396).

    H = 𝓛 D 𝓛ᵀ          𝓛 block lower triangular with unit diagonal blocks, D block diagonal; H = E[x xᵀ], damped
    for every block k of columns, last to first:
        Ẑ_k = round( Z_k + Σ_{j > k} (Z_j - Ẑ_j) 𝓛_jk )

In blocks of one column this is GPTQ from the last column to the first. The feedback of later panels is added in one
product per panel, that within the panel immediately; on a GPU one kernel walks the blocks of a panel, for lattice codes
and single values of known places (ldlq_panel.py). A group's scale is fitted when the sweep reaches the group's last
column, to the values its columns would take if the group were not rounded: T with T = Z + (Z - T) (𝓛 - 1) within the
group, plus the feedback of later columns. If it is searched, errors are weighted by the diagonal of D in blocks of one.

Sweeps of coordinate descent may follow (ldlq_tuning.py). A trellis code is rounded in blocks of 16 columns. Matrices of
one shape, as those of a layer's experts, are swept together.

Shapes: E matrices, O out_features, I in_features, N rows of all matrices, L codes of a row, P columns of a panel,
D columns of a block, K blocks, Q columns of whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lqer.components import ADDED
from lqer.formats import NumberFormat, QuantizedTensor
from lqer.formats.base import check_finite
from lqer.rounding.base import Rounding, Statistics, require_damping, unsupported_feedback
from lqer.rounding.groups import Groups
from lqer.rounding.hessian import DAMPING, DampedHessian, damped_hessian
from lqer.rounding.ldlq_panel import panel_rounding
from lqer.rounding.ldlq_tuning import tuned
from lqer.rounding.scale_search import Scales, importance, require_scales, unsupported_search
from lqer.rounding.stack import add_products, rows_of_all, side_by_side, stacked
from lqer.statistics import Hessian, Statistic
from lqer.statistics.symmetric import PANEL_ROWS


def ldlq(
    weight_OI: Tensor,
    damped: DampedHessian,
    number_format: NumberFormat,
    *,
    block: int | None = None,
    static_groups: bool = False,
    tune_iters: int = 0,
    scales: Scales = "minmax",
) -> QuantizedTensor:
    """Round a float32 weight with block error feedback.

    damped: E[x xᵀ] of the weight's inputs. block: columns rounded together, a multiple of the format's vector size and
    that size by default. tune_iters: sweeps of coordinate descent afterwards; they never raise the loss under the
    damped Hessian. static_groups, scales: as for `gptq`.

    Raises NonFiniteError for a weight that is not finite, HessianError as a factorization of `damped` does, ValueError
    for a block that does not match the format.
    """
    check_finite(weight_OI)
    block = number_format.vector_size if block is None else block
    if block < 1 or block % number_format.vector_size:
        raise ValueError(f"block {block} is not a multiple of {number_format.vector_size} ({number_format.kind})")
    weight_IEO = side_by_side([weight_OI.to(torch.float32)])
    groups, codes, error_IEO = _sweep(weight_IEO, [damped], number_format, block, static_groups, scales)
    if tune_iters:
        codes = tuned(weight_IEO[:, 0], error_IEO[:, 0], codes, damped.matrix(torch.float32), groups, block, tune_iters)
    return groups.finish(_in_order(codes))[0]


def ldlq_together(
    weights: Sequence[Tensor],
    hessians: Sequence[DampedHessian],
    number_format: NumberFormat,
    *,
    static_groups: bool = False,
    scales: Scales = "minmax",
) -> list[QuantizedTensor]:
    """`ldlq` of several weights of one shape, in blocks of a vector, each under the Hessian at its place."""
    check_finite(*weights)
    weight_IEO, block = side_by_side([weight_OI.to(torch.float32) for weight_OI in weights]), number_format.vector_size
    groups, codes, _ = _sweep(weight_IEO, hessians, number_format, block, static_groups, scales)
    return groups.finish(_in_order(codes))


def _sweep(
    weight_IEO: Tensor,
    hessians: Sequence[DampedHessian],
    number_format: NumberFormat,
    block: int,
    static_groups: bool,
    scales: Scales,
) -> tuple[Groups, dict[int, Tensor], Tensor]:
    """The fitted groups, codes (N, L) of blocks by their first column, and errors (I, E, O)."""
    diagonals = [damped.cholesky_II.diagonal().square() for damped in hessians]
    in_features, matrices, out_features = weight_IEO.shape
    groups = Groups(number_format, out_features, in_features, importance(scales, stacked(diagonals)), matrices)
    if not groups.single and groups.width % block:
        raise ValueError(f"block {block} does not divide groups of {groups.width} columns ({number_format.kind})")
    if static_groups or groups.single:
        groups.fit_all(rows_of_all(weight_IEO))
    lower_EII = stacked([damped.derived(feedback, block) for damped in hessians])
    codes: dict[int, Tensor] = {}
    error_IEO = torch.empty_like(weight_IEO)
    panel = -(-groups.panel // block) * block
    round_panel = panel_rounding(groups, block, weight_IEO.is_cuda)
    for start in reversed(range(0, in_features, panel)):
        now, later = slice(start, min(start + panel, in_features)), slice(min(start + panel, in_features), None)
        target_PEO = weight_IEO[now].clone()
        add_products(target_PEO, lower_EII[:, later, now], error_IEO[later])
        found = round_panel(target_PEO, weight_IEO[now], lower_EII[:, now, now], start, groups, block)
        panel_codes, error_IEO[now] = found
        codes |= panel_codes
    return groups, codes, error_IEO


def _in_order(codes: dict[int, Tensor]) -> Tensor:
    return torch.cat([codes[k] for k in sorted(codes)], dim=1)


def feedback(damped: DampedHessian, block: int) -> Tensor:
    """𝓛 of the damped H in blocks of `block` columns, float32: for `DampedHessian.derived`."""
    return block_lower(damped.cholesky_II, block, torch.float32)


def block_lower(cholesky_II: Tensor, block: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """𝓛 (I, I) of H = C Cᵀ given C: block column i is that of C times C_ii⁻¹; the last block may be smaller."""
    size = len(cholesky_II)
    lower_II = torch.zeros(size, size, dtype=dtype, device=cholesky_II.device)
    width = max(PANEL_ROWS // block, 1) * block
    for first in range(0, size, width):
        now, below = slice(first, min(first + width, size)), slice(first, size)
        count = -(-(now.stop - first) // block)
        # Padded with an identity, so that all blocks have one size and are solved in one batch.
        panel_PQ = cholesky_II.new_zeros(max(size - first, count * block), count * block)
        panel_PQ[: size - first, : now.stop - first] = cholesky_II[below, now]
        panel_PQ.diagonal()[now.stop - first :] = 1
        columns_KPD = panel_PQ.unflatten(1, (count, block)).transpose(0, 1)
        square_KKDD = columns_KPD[:, : count * block].unflatten(1, (count, block))
        diagonal_KDD = square_KKDD.diagonal(dim1=0, dim2=1).permute(2, 0, 1)
        lower_KPD = torch.linalg.solve_triangular(diagonal_KDD, columns_KPD, upper=False, left=False)
        lower_II[below, now] = lower_KPD.transpose(0, 1).flatten(1)[: size - first, : now.stop - first].to(dtype)
    return lower_II


@dataclass(frozen=True)
class Ldlq(Rounding):
    """`ldlq` as a configuration names it; blocks are the format's vectors."""

    kind = "ldlq"
    statistics: ClassVar[frozenset[Statistic]] = frozenset({Hessian()})

    damping: float = DAMPING
    static_groups: bool = False
    tune_iters: int = 0
    scales: Scales = field(default="minmax", metadata=ADDED)

    def __post_init__(self) -> None:
        require_damping(self.damping, self.kind)
        require_scales(self.scales, self.kind)
        if not isinstance(self.tune_iters, int) or self.tune_iters < 0:
            raise ValueError(f"tune_iters {self.tune_iters!r} is not an integer of at least 0 (ldlq)")

    def round(self, weight_OI: Tensor, statistics: Statistics, number_format: NumberFormat) -> QuantizedTensor:
        return ldlq(
            weight_OI, damped_hessian(statistics, self.damping), number_format, static_groups=self.static_groups,
            tune_iters=self.tune_iters, scales=self.scales,
        )  # fmt: skip

    def round_together(
        self, weights: Sequence[Tensor], statistics: Sequence[Statistics], number_format: NumberFormat
    ) -> list[QuantizedTensor]:
        # Coordinate descent takes each on its own.
        if len(weights) == 1 or self.tune_iters:
            return super().round_together(weights, statistics, number_format)
        hessians = [damped_hessian(of_one, self.damping) for of_one in statistics]
        return ldlq_together(weights, hessians, number_format, static_groups=self.static_groups, scales=self.scales)

    def unsupported_reason(self, number_format: NumberFormat) -> str | None:
        return unsupported_feedback(number_format) or unsupported_search(number_format, self.scales)
