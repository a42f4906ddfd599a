"""GPTVQ's sweep as its published code computes it (van Baalen et al., arXiv 2402.15319), without the codebook update.

It differs from `lqer.rounding.vector` in five ways:

- k-means is weighted with diag(U), or not at all where D = 1, instead of 1 / diag(U)²;
- vectors are assigned with weights 1 / diag(U) instead of 1 / diag(U)²;
- of the block U_PP of a vector only the diagonal is inverted;
- with block scales, a panel's vectors are assigned as they were before any feedback within the panel;
- a centroid without vectors becomes zero.

Shapes: O out_features, I in_features, G groups of rows, R rows of a group, C columns of a group, N vectors of a group,
D elements of a vector, K centroids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lqer.formats import Codebook
from lqer.formats.kmeans import initial_centroids

PANEL_COLUMNS = 128


def gptvq_values(
    weight_OI: Tensor, hessian_II: Tensor, number_format: Codebook, iterations: int = 30, damping: float = 0.01
) -> Tensor:
    """The rounded weight, float32 (O, I). out_features: a multiple of the rows of a group."""
    size, dimension = len(hessian_II), number_format.dimension
    damped_II = hessian_II.double() / hessian_II.double().diagonal().mean() + damping * torch.eye(size)
    upper_II = torch.linalg.cholesky(torch.linalg.inv(damped_II)).T
    feedback_II = (upper_II / upper_II.diagonal()[:, None]).float()
    diagonal_I = (upper_II.diagonal() / upper_II.diagonal().mean()).float()
    layout = number_format.layout(*weight_OI.shape)
    moving_OI, values_OI = weight_OI.clone(), torch.empty_like(weight_OI)
    for columns in layout.column_ranges():
        inside = slice(columns.start, columns.stop)
        scale_OC = number_format.decode_scales(number_format.fit_scales(moving_OI[:, inside]), moving_OI[:, inside])
        fit_C = diagonal_I[inside] if dimension > 1 else torch.ones(len(columns))
        importance_OC = fit_C * (scale_OC / scale_OC.amax()).square()
        scaled, importance = (
            x_OC.split(layout.group_rows) for x_OC in (moving_OI[:, inside] / scale_OC, importance_OC)
        )
        centroids = [
            _k_means(
                *(x.unflatten(1, (-1, dimension)).flatten(0, 1) for x in pair), number_format.centroids, iterations
            )
            for pair in zip(scaled, importance, strict=True)
        ]
        # As they are stored.
        centroids_GKD = number_format.decode_centroids(number_format.encode_centroids(torch.stack(centroids)))
        for panel in columns[::PANEL_COLUMNS]:
            stop = min(panel + PANEL_COLUMNS, columns.stop)
            before_OI = moving_OI.clone()
            for first in range(panel, stop, dimension):
                vector = slice(first, first + dimension)
                scale_OD = scale_OC[:, first - columns.start : first - columns.start + dimension]
                assigned_OI = before_OI if number_format.scale_block_size else moving_OI
                nearest = [
                    centroids_KD[_distances(x_RD, 1 / diagonal_I[vector], centroids_KD).argmin(1)]
                    for x_RD, centroids_KD in zip(
                        (assigned_OI[:, vector] / scale_OD).split(layout.group_rows), centroids_GKD, strict=True
                    )
                ]
                values_OI[:, vector] = scale_OD * torch.cat(nearest)
                error_OD = moving_OI[:, vector] - values_OI[:, vector]
                moving_OI[:, vector.stop :] -= error_OD @ feedback_II[vector, vector.stop :]
    return values_OI


def _k_means(x_ND: Tensor, weight_ND: Tensor, centroids: int, iterations: int) -> Tensor:
    draws_GK = torch.empty(1, centroids)  # "mahalanobis" draws nothing
    centroids_KD = initial_centroids(x_ND[None], weight_ND[None], centroids, "mahalanobis", draws_GK)[0]
    for _ in range(iterations):
        codes_N = _distances(x_ND, weight_ND, centroids_KD).argmin(1)
        totals_KD, sums_KD = (
            torch.zeros_like(centroids_KD).index_add_(0, codes_N, values_ND)
            for values_ND in (weight_ND, weight_ND * x_ND)
        )
        centroids_KD = torch.where(totals_KD > 0, sums_KD / totals_KD, 0.0)
    return centroids_KD


def _distances(x_ND: Tensor, weight_ND: Tensor, centroids_KD: Tensor) -> Tensor:
    """Weighted squared distances (N, K)."""
    return (weight_ND.expand_as(x_ND)[:, None] * (x_ND[:, None] - centroids_KD).square()).sum(-1)
