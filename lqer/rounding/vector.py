"""GPTVQ: vector quantization with error feedback (van Baalen et al., arXiv 2402.15319, algorithm 1).

For a weight W and the Hessian H = E[x xᵀ] of its inputs, codes and codebooks that keep tr((W - Q) H (W - Q)ᵀ) small:

    U = upper Cholesky factor of (H + damping)⁻¹               H⁻¹ = Uᵀ U
    for each group of columns:
        S = block scales of W;  C = codebooks of W / S         weighted k-means, weights S² / diag(U)²
        for each panel of up to 128 columns of the group, for each vector P of D columns in it:
            code = nearest centroid of W_P / S                 weights 1 / diag(U_P)²
            E_P  = W_P - S C[code]
            W_rest -= E_P U_PP⁻¹ U_P,rest                      the rest of the panel now, later columns afterwards
    C = argmin tr((W - Q) H (W - Q)ᵀ)                          codes and scales fixed: lqer.rounding.codebook_update

E_P U_PP⁻¹ U_P,rest is the exact optimal-brain-surgeon step for D columns at once, with D = 1 that of GPTQ. The vector
contributes |E_P U_PP⁻¹|² to the loss; the diagonal of that form, 1 / diag(U)², weights k-means and assignment. The
published code weights and inverts differently (docs/methods/gptvq.md).

On a GPU one kernel walks the vectors of a panel (rounding/vector_sweep.py).

Shapes: I in_features, O out_features padded to whole groups of rows, G groups of rows, R rows of a group, K centroids,
D elements of a vector, P columns of a panel, V vectors, N vectors of a group, C centroids of all groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from lqer.components import require_choice, require_range
from lqer.formats import Codebook, NumberFormat, QuantizedTensor
from lqer.formats.base import check_finite
from lqer.formats.kmeans import DEFAULT_ITERATIONS, fit_centroids, lowest_index
from lqer.rounding.base import Rounding, Statistics, require_damping
from lqer.rounding.codebook_update import Update, update_codebooks
from lqer.rounding.factor import vector_feedback
from lqer.rounding.hessian import DAMPING, DampedHessian, damped_hessian
from lqer.statistics import Hessian, Statistic

PANEL_COLUMNS = 128
PER_GROUP = ("codebooks", "codebook_scales")
# From vectors and what an error of each element costs, both float32 [G, N, D], to centroids [G, K, D].
Fit = Callable[[Tensor, Tensor], Tensor]


def sweep_vectors(
    weight_OI: Tensor, damped: DampedHessian, number_format: Codebook, codebooks: Fit | Mapping[str, Tensor]
) -> QuantizedTensor:
    """Algorithm 1 without the update at its end: a weight (O, I), float32, in codebooks, with error feedback.

    damped: of the weight's inputs; an input that calibration never saw counts like an average one. codebooks: how each
    group of columns gets its own when the sweep reaches it, or fixed ones under the names of a QuantizedTensor's parts.

    Raises NonFiniteError for a weight that is not finite, HessianError for a Hessian that is not positive
    semi-definite, ValueError for one of another size and for in_features that `dimension` does not divide.
    """
    check_finite(weight_OI)
    out_features, in_features = weight_OI.shape
    if (inputs := len(damped.dead_I)) != in_features:
        raise ValueError(f"a Hessian of shape {(inputs, inputs)} does not fit {in_features} in_features")
    # Refuses a width that its vectors do not divide.
    layout = number_format.layout(out_features, in_features)
    feedback_II, diagonal_I = damped.derived(vector_feedback, number_format.dimension)
    diagonal_I1 = (diagonal_I / diagonal_I.mean()).to(torch.float32).unsqueeze(1)
    importance_I1 = diagonal_I1.pow(-2)

    basis = _basis(weight_OI, number_format, codebooks)
    padded_rows = layout.row_groups * layout.group_rows - out_features
    moving_IO = pad(weight_OI, (0, 0, 0, padded_rows)).T.contiguous()
    counted_O = torch.arange(moving_IO.shape[1], device=weight_OI.device) < out_features
    sweep_panel = _panel_in_one_kernel if weight_OI.is_cuda else _panel_vector_by_vector
    codes_VO, scales, stored = [], [], []
    for index, columns in enumerate(layout.column_ranges()):
        group = slice(columns.start, columns.stop)
        group_OI = moving_IO[group, :out_features].T
        scales.append(number_format.fit_scales(group_OI))
        scale_IO = pad(number_format.decode_scales(scales[-1], group_OI).T, (0, padded_rows), value=1.0).contiguous()
        if isinstance(codebooks, Mapping):
            stored.append({name: codebooks[name][:, index] for name in PER_GROUP})
        else:
            importance_IO = importance_I1[group] * (scale_IO / scale_IO.amax()).square() * counted_O
            x_GND = _vectors(moving_IO[group] / scale_IO, layout.row_groups, number_format.dimension)
            importance_GND = _vectors(importance_IO, layout.row_groups, number_format.dimension)
            centroids_GKD = codebooks(x_GND, importance_GND)
            stored.append(number_format.encode_centroids(centroids_GKD, basis.get("codebook_basis")))
        centroids_GKD = number_format.decode_centroids(basis | stored[-1])
        for panel in columns[::PANEL_COLUMNS]:
            stop = min(panel + PANEL_COLUMNS, columns.stop)
            panel_codes_VO, error_PO = sweep_panel(
                moving_IO[panel:stop],
                scale_IO[panel - columns.start : stop - columns.start],
                importance_I1[panel:stop],
                feedback_II[panel:stop, panel:stop],
                centroids_GKD,
            )
            codes_VO.append(panel_codes_VO)
            moving_IO[stop:].addmm_(feedback_II[panel:stop, stop:].T, error_PO, alpha=-1)

    parts = {"codes": torch.cat(codes_VO).T[:out_features].contiguous()}
    parts |= {name: torch.cat([part[name] for part in scales], dim=-1) for name in scales[0]}
    parts |= {name: torch.stack([part[name] for part in stored], dim=1) for name in PER_GROUP}
    return QuantizedTensor(number_format, (out_features, in_features), 1, parts | basis)


def _basis(weight_OI: Tensor, number_format: Codebook, codebooks: Fit | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The basis that all codebooks of low rank share, known before the first column: that of a fit without feedback."""
    if not number_format.codebook_rank:
        return {}
    parts = codebooks if isinstance(codebooks, Mapping) else number_format.quantize(weight_OI).parts
    return {"codebook_basis": parts["codebook_basis"]}


def _panel_vector_by_vector(
    panel_PO: Tensor,
    scale_PO: Tensor,
    importance_P1: Tensor,
    feedback_PP: Tensor,
    centroids_GKD: Tensor,
) -> tuple[Tensor, Tensor]:
    """Assign the vectors of a panel one after the other, updating the panel's later columns in place.

    Returns uint8 codes [V, O] and the errors [P, O] that are still to be fed back to the columns after the panel.
    """
    groups, centroids, dimension = centroids_GKD.shape
    columns, rows = panel_PO.shape
    centroid_DC = centroids_GKD.permute(2, 0, 1).reshape(dimension, groups * centroids)
    first_O = torch.arange(groups, device=panel_PO.device).repeat_interleave(rows // groups) * centroids
    # The distance without the term that has no centroid in it: importance c² - 2 importance w c.
    centroid_DKG1 = centroids_GKD.permute(2, 1, 0).unsqueeze(-1).contiguous()
    square_VKG1 = torch.einsum("vd,dkgo->vkgo", importance_P1.view(-1, dimension), centroid_DKG1.square())
    minus_twice_DKG1 = -2 * centroid_DKG1
    codes_VO = torch.empty(columns // dimension, rows, dtype=torch.uint8, device=panel_PO.device)
    error_PO = torch.empty_like(panel_PO)
    for v in range(columns // dimension):
        vector = slice(v * dimension, (v + 1) * dimension)
        weighted_DGR = (panel_PO[vector] / scale_PO[vector] * importance_P1[vector]).view(dimension, groups, -1)
        distance_KGR = square_VKG1[v]
        for minus_twice_KG1, weighted_GR in zip(minus_twice_DKG1, weighted_DGR, strict=True):
            distance_KGR = torch.addcmul(distance_KGR, minus_twice_KG1, weighted_GR)
        codes_O = lowest_index(distance_KGR, 0).flatten()
        nearest_DO = centroid_DC.index_select(1, first_O + codes_O)
        torch.addcmul(panel_PO[vector], scale_PO[vector], nearest_DO, value=-1, out=error_PO[vector])
        panel_PO[vector.stop :].addmm_(feedback_PP[vector, vector.stop :].T, error_PO[vector], alpha=-1)
        codes_VO[v] = codes_O
    return codes_VO, error_PO


def _panel_in_one_kernel(
    panel_PO: Tensor,
    scale_PO: Tensor,
    importance_P1: Tensor,
    feedback_PP: Tensor,
    centroids_GKD: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same on a GPU, where a vector would cost some ten launches; the panel is left as it is."""
    from lqer.rounding import vector_sweep

    return vector_sweep.sweep_panel(panel_PO, scale_PO, importance_P1, feedback_PP, centroids_GKD)


def _vectors(x_IO: Tensor, groups: int, dimension: int) -> Tensor:
    """[G, N, D]: the vectors of each group of rows."""
    x_VDGR = x_IO.unflatten(1, (groups, -1)).unflatten(0, (-1, dimension))
    return x_VDGR.permute(2, 3, 0, 1).flatten(1, 2).contiguous()


@dataclass(frozen=True)
class Vector(Rounding):
    """`vector` as a configuration names it.

    iterations, seed: of k-means, see `fit_centroids`. damping: of the Hessian in the sweep, as a fraction of its mean
    diagonal. update: how the centroids are refitted after it, on the Hessian as it is given, see `update_codebooks`.
    """

    kind = "vector"
    statistics: ClassVar[frozenset[Statistic]] = frozenset({Hessian()})

    iterations: int = DEFAULT_ITERATIONS
    damping: float = DAMPING
    update: Update = "cg"
    seed: int = 0

    def __post_init__(self) -> None:
        require_damping(self.damping, self.kind)
        require_range("iterations", self.iterations, 0, 10_000, self.kind)
        require_choice("update", self.update, get_args(Update), self.kind)

    def round(self, weight_OI: Tensor, statistics: Statistics, number_format: NumberFormat) -> QuantizedTensor:
        assert isinstance(number_format, Codebook), "the configuration lets no other format through"
        weight_OI = weight_OI.detach().to(torch.float32)
        fit = partial(fit_centroids, centroids=number_format.centroids, iterations=self.iterations, seed=self.seed)
        swept = sweep_vectors(weight_OI, damped_hessian(statistics, self.damping), number_format, fit)
        given = statistics["hessian"]
        hessian_II = given.hessian_II if isinstance(given, DampedHessian) else given
        return update_codebooks(weight_OI, hessian_II, swept, self.update)

    def unsupported_reason(self, number_format: NumberFormat) -> str | None:
        if isinstance(number_format, Codebook):
            return None
        return f'vector learns codebooks: its weights are of kind "codebook", not "{number_format.kind}"'
