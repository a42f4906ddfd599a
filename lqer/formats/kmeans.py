"""Weighted k-means for thousands of small problems at once: the fit of a codebook.

For each group, centroids c_k are sought that minimise

    sum_n  min_k  sum_d  weight_nd (x_nd - c_kd)^2

by expectation-maximisation: every vector takes its nearest centroid, every centroid becomes the weighted mean of its
vectors. Neither step can raise the objective. A centroid without vectors moves to the vector with the largest error of
its group (one per step), which cannot raise it either: nobody used that centroid. A vector whose weights are all zero
is not there: groups of different sizes are padded with such vectors.

The distance is expanded, weight x^2 - 2 weight x c + weight c^2, so that the work is one batched product over 2 D
features, and the sums of the second step are sums of those same features. Work is cut into chunks of groups, and of
vectors where one group is too large, which bounds the memory and, on a CPU, keeps a chunk in its cache. On a GPU
`kmeans_kernel.py` does the same.

Shapes: G groups, N vectors of a group (n of a chunk), D elements of a vector, K centroids (at most 256),
F = 2 D features.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Seeds = Literal["kmeans++", "mahalanobis", "cdf"]

# GPTVQ runs 100; errors of layers change by less than 1% after 30 (docs/methods/gptvq.md).
DEFAULT_ITERATIONS = 30

# Distances held at once. 2^18 floats are the second-level cache of a CPU core; on a GPU 2^28 are 1 GiB.
CHUNK_ELEMENTS = {"cpu": 1 << 18}
CHUNK_ELEMENTS_ELSEWHERE = 1 << 28
# k-means++ draws from integer weights: their running sum is exact, so that no order of summation can change the draw.
DRAW_RESOLUTION = 2.0**30


def fit_centroids(
    x_GND: Tensor,
    weight_GND: Tensor,
    centroids: int,
    seeds: Seeds | None = None,
    iterations: int = DEFAULT_ITERATIONS,
    seed: int = 0,
) -> Tensor:
    """Centroids [G, K, D], float32, of finite float32 vectors; with D = 1 in ascending order.

    weight_GND: float32, not negative, broadcastable to x_GND. seeds: "kmeans++" (drawn with `seed`), "mahalanobis" or
    "cdf" (D = 1), see `initial_centroids`; None is "cdf" where it can be, else "kmeans++".
    Raises ValueError for "cdf" with D > 1.
    """
    seeds = seeds or ("cdf" if x_GND.shape[2] == 1 else "kmeans++")
    unit_G11 = _unit(x_GND)
    x_GND, weight_GND = x_GND / unit_G11, _in_unit_weights(weight_GND, x_GND)
    chunks = []
    groups_at_once = max(1, _chunk_elements(x_GND.device) // (x_GND.shape[1] * centroids))
    draws_GK = torch.rand(len(x_GND), centroids, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draws_GK = draws_GK.to(x_GND.device)
    parts = (tensor.split(groups_at_once) for tensor in (x_GND, weight_GND, draws_GK))
    for x_gND, weight_gND, draws_gK in zip(*parts, strict=True):
        centroids_gKD = initial_centroids(x_gND, weight_gND, centroids, seeds, draws_gK)
        chunks.append(improve(x_gND, weight_gND, centroids_gKD, iterations))
    centroids_GKD = torch.cat(chunks) * unit_G11
    return centroids_GKD.sort(dim=1).values if x_GND.shape[2] == 1 else centroids_GKD


def nearest_centroids(x_GND: Tensor, weight_GND: Tensor, centroids_GKD: Tensor) -> Tensor:
    """uint8 index [G, N] of each vector's nearest centroid, the lowest among equals."""
    unit_G11 = _unit(x_GND)
    x_GND, weight_GND = x_GND / unit_G11, _in_unit_weights(weight_GND, x_GND)
    groups_at_once = max(1, _chunk_elements(x_GND.device) // (x_GND.shape[1] * centroids_GKD.shape[1]))
    parts = (tensor.split(groups_at_once) for tensor in (x_GND, weight_GND, centroids_GKD / unit_G11))
    return torch.cat([_assign(features_of(x, weight), near)[0] for x, weight, near in zip(*parts, strict=True)])


def objective(x_GND: Tensor, weight_GND: Tensor, centroids_GKD: Tensor) -> Tensor:
    """What is minimised, float64 [G], each vector with its nearest centroid."""
    codes_GN = nearest_centroids(x_GND, weight_GND, centroids_GKD).to(torch.int64)
    nearest_GND = centroids_GKD.gather(1, codes_GN.unsqueeze(-1).expand_as(x_GND))
    return (weight_GND.double() * (x_GND - nearest_GND).double().square()).sum((1, 2))


def lowest_index(scores: Tensor, dim: int) -> Tensor:
    """uint8 index of the smallest of at most 256 scores along `dim`, the lowest among equals; NaN is not handled.

    What `argmin` gives. On a CPU two passes of vectorised minima take a third of the time of `argmin`.
    """
    shape = [1] * scores.dim()
    shape[dim] = -1
    index = torch.arange(scores.shape[dim], dtype=torch.uint8, device=scores.device).view(shape)
    is_larger = (scores != scores.amin(dim, keepdim=True)).view(torch.uint8)
    return is_larger.neg_().bitwise_or_(index).amin(dim)  # 0 - 1 is 255: above or equal to every index


def cluster_sums(features_GFN: Tensor, codes_GN: Tensor, centroids: int) -> Tensor:
    """Sums [G, F, K] of the features of the vectors that share a code; the same bits every time, on every device."""
    if features_GFN.is_cuda:
        # Atomic additions, as of a scatter, come in another order every time.
        from lqer.formats import kmeans_kernel

        return kmeans_kernel.cluster_sums(features_GFN, codes_GN, centroids)
    index_GFN = codes_GN.to(torch.int64).unsqueeze(1).expand_as(features_GFN)
    sums_GFK = features_GFN.new_zeros(*features_GFN.shape[:2], centroids)
    return sums_GFK.scatter_add_(2, index_GFN, features_GFN)


def initial_centroids(x_GND: Tensor, weight_GND: Tensor, centroids: int, seeds: Seeds, draws_GK: Tensor) -> Tensor:
    """Vectors of each group that EM starts from, [G, K, D].

    "mahalanobis" (GPTVQ): K evenly spaced of the vectors in the order of their Mahalanobis distance from the group's
    mean. "cdf": K evenly spaced of the values in their order, D = 1. "kmeans++": drawn one after the other with
    probability proportional to the weighted squared distance from the nearest already drawn; draws_GK, float64 in
    [0, 1), are the random numbers.
    """
    if seeds == "kmeans++":
        return drawn_seeds(x_GND, weight_GND, draws_GK)
    present_GN = (weight_GND > 0).any(-1)
    if seeds == "mahalanobis":
        return _evenly_spaced(x_GND, _mahalanobis_distance(x_GND, present_GN), present_GN, centroids)
    if x_GND.shape[2] != 1:
        raise ValueError(f"seeds 'cdf' order single values, found vectors of {x_GND.shape[2]} (kmeans)")
    return _evenly_spaced(x_GND, x_GND.squeeze(-1), present_GN, centroids)


def improve(x_GND: Tensor, weight_GND: Tensor, centroids_GKD: Tensor, iterations: int) -> Tensor:
    """EM steps from the given centroids."""
    dimension = x_GND.shape[2]
    features_GFN = features_of(x_GND, weight_GND)
    if x_GND.is_cuda:
        from lqer.formats import kmeans_kernel

        return kmeans_kernel.improve(x_GND, features_GFN, centroids_GKD, iterations)
    own_GN = (features_GFN[:, :dimension] * x_GND.mT).sum(1)
    for _ in range(iterations):
        codes_GN, lowest_GN = _assign(features_GFN, centroids_GKD)
        sums_GKF = cluster_sums(features_GFN, codes_GN, centroids_GKD.shape[1]).mT
        weighted_GKD, total_GKD = sums_GKF[..., :dimension], sums_GKF[..., dimension:]
        # Where a dimension of a used centroid carries no weight, any value does: the old one stays.
        means_GKD = torch.where(total_GKD > 0, weighted_GKD / total_GKD, centroids_GKD)
        empty_GK = ~(total_GKD > 0).any(-1)
        worst_G1D = x_GND.take_along_dim((lowest_GN + own_GN).argmax(1)[:, None, None], 1)
        first_empty_GK = empty_GK & (empty_GK.cumsum(1) == 1)
        centroids_GKD = torch.where(first_empty_GK.unsqueeze(-1), worst_G1D, means_GKD)
    return centroids_GKD


def _unit(x_GND: Tensor) -> Tensor:
    """A power of two near each group's largest magnitude, [G, 1, 1]: an exact divisor that keeps squares finite."""
    exponent_G11 = torch.frexp(x_GND.abs().amax((1, 2), keepdim=True)).exponent
    return exponent_G11.clamp(-126, 127).to(torch.float32).exp2()


def _in_unit_weights(weight_GND: Tensor, x_GND: Tensor) -> Tensor:
    """Weights of each group relative to the largest, which is all that matters, in the shape of x."""
    weight_GND = weight_GND.expand_as(x_GND)
    return weight_GND / _unit(weight_GND)


def features_of(x_GND: Tensor, weight_GND: Tensor) -> Tensor:
    """[G, F, N]: weight x and weight, the parts of the expanded distance that belong to a vector."""
    return torch.cat([weight_GND * x_GND, weight_GND], dim=-1).mT.contiguous()


def _assign(features_GFN: Tensor, centroids_GKD: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 codes [G, N] of the nearest centroids, and their distances without the term that has no centroid in it."""
    of_centroid_GKF = torch.cat([-2 * centroids_GKD, centroids_GKD.square()], dim=-1)
    if features_GFN.is_cuda:
        from lqer.formats import kmeans_kernel

        return kmeans_kernel.assign(features_GFN, of_centroid_GKF)
    at_once = max(1, _chunk_elements(features_GFN.device) // of_centroid_GKF[..., 0].numel())
    codes, lowest = [], []
    for part_GFn in features_GFN.split(at_once, dim=2):
        distance_GKn = torch.bmm(of_centroid_GKF, part_GFn)
        codes.append(lowest_index(distance_GKn, 1))
        lowest.append(distance_GKn.amin(1))
    return torch.cat(codes, dim=1), torch.cat(lowest, dim=1)


def drawn_seeds(x_GND: Tensor, weight_GND: Tensor, draws_GK: Tensor) -> Tensor:
    """The seeds of "kmeans++", see `initial_centroids`."""
    if x_GND.is_cuda:
        from lqer.formats import kmeans_kernel

        if x_GND.shape[1] <= kmeans_kernel.MOST_DRAWN_FROM:
            return kmeans_kernel.drawn_seeds(x_GND, weight_GND, draws_GK, DRAW_RESOLUTION)
    chosen = []
    error_GN = weight_GND.sum(-1)  # the first is drawn in proportion to its weight
    for draw_G in draws_GK.unbind(1):
        largest_G1 = error_GN.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        running_GN = (error_GN / largest_G1 * DRAW_RESOLUTION).to(torch.int64).cumsum(1)
        target_G = (draw_G * running_GN[:, -1]).to(torch.int64)
        index_G1 = torch.searchsorted(running_GN, target_G.unsqueeze(1), right=True).clamp_(max=x_GND.shape[1] - 1)
        chosen.append(x_GND.take_along_dim(index_G1.unsqueeze(-1), 1))
        distance_GN = (weight_GND * (x_GND - chosen[-1]).square()).sum(-1)
        error_GN = distance_GN if len(chosen) == 1 else torch.minimum(error_GN, distance_GN)
    return torch.cat(chosen, dim=1)


def _evenly_spaced(x_GND: Tensor, order_GN: Tensor, present_GN: Tensor, centroids: int) -> Tensor:
    sorted_GN = order_GN.masked_fill(~present_GN, torch.inf).argsort(dim=1, stable=True)
    last_G1 = present_GN.sum(1, keepdim=True) - 1
    steps_K = torch.linspace(0, 1, centroids, dtype=torch.float64, device=x_GND.device)
    rank_GK = (last_G1 * steps_K).round().to(torch.int64).clamp_(min=0)
    return x_GND.take_along_dim(sorted_GN.gather(1, rank_GK).unsqueeze(-1), 1)


def _mahalanobis_distance(x_GND: Tensor, present_GN: Tensor) -> Tensor:
    """Squared, [G, N], up to a factor per group."""
    present_GN1 = present_GN.unsqueeze(-1).to(x_GND.dtype)
    count_G11 = present_GN1.sum(1, keepdim=True).clamp(min=1)
    centred_GND = (x_GND - (x_GND * present_GN1).sum(1, keepdim=True) / count_G11) * present_GN1
    covariance_GDD = (centred_GND.mT @ centred_GND / count_G11).to(torch.float64)
    # A group on a line, or of zeros, has a singular covariance: the floor is far below any rounding of float32 input.
    floor_G = covariance_GDD.diagonal(dim1=1, dim2=2).mean(1) * 1e-9 + torch.finfo(torch.float32).tiny
    identity_DD = torch.eye(x_GND.shape[2], dtype=torch.float64, device=x_GND.device)
    inverse_GDD = torch.linalg.inv_ex(covariance_GDD + floor_G[:, None, None] * identity_DD).inverse
    # Only the order matters: the largest entry becomes 1, so that float32 holds it.
    inverse_GDD = inverse_GDD / inverse_GDD.abs().amax((1, 2), keepdim=True)
    return ((centred_GND @ inverse_GDD.to(torch.float32)) * centred_GND).sum(-1)


def _chunk_elements(device: torch.device) -> int:
    return CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS_ELSEWHERE)
