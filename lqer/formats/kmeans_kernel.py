"""K-means on a GPU: `kmeans.py` without a tensor of all distances, without atomics, and with few launches.

In PyTorch the distances [G, K, N] and the indicators of the codes go through memory several times, and they are K / D
times as large as the vectors; and a step of EM costs some twenty launches of a few microseconds. Here a program holds a
tile of them in registers, and a step is three launches. Sums are taken in a fixed order, so that every run gives the
same bits. It imports triton: only for tensors on a GPU, or in Triton's interpreter.

Shapes: G groups, N vectors of a group, D elements of a vector, F features of a vector, K centroids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile of K x N: four warps hold it in 32 registers a thread.
TILE = 4096
# The sides of a tile of centroids and vectors whose features are added up.
SUMMED_CENTROIDS, SUMMED_VECTORS = 16, 128
# A program that draws seeds holds all vectors of a group: sixteen warps, 32 vectors a thread.
MOST_DRAWN_FROM = 1 << 14
VECTORS_OF_A_WARP = 1 << 10
SMALLEST_NORMAL = tl.constexpr(torch.finfo(torch.float32).tiny)
# Vectors that are compared at once to find the worst of a group.
COMPARED_VECTORS = 512


def assign(features_GFN: Tensor, of_centroid_GKF: Tensor) -> tuple[Tensor, Tensor]:
    """For each vector, the k with the smallest Σ_f of_centroid_kf feature_f, the lowest among equals, and that sum.

    Both float32; K at most 256. Returns uint8 [G, N] and float32 [G, N].
    """
    groups, features, vectors = features_GFN.shape
    centroids = of_centroid_GKF.shape[1]
    features_GFN, of_centroid_GKF = features_GFN.contiguous(), of_centroid_GKF.contiguous()
    codes_GN = torch.empty(groups, vectors, dtype=torch.uint8, device=features_GFN.device)
    lowest_GN = torch.empty(groups, vectors, dtype=torch.float32, device=features_GFN.device)
    width = triton.next_power_of_2(centroids)
    block = min(max(TILE // width, 16), triton.next_power_of_2(vectors))
    assign_kernel[(groups, triton.cdiv(vectors, block))](
        features_GFN, of_centroid_GKF, codes_GN, lowest_GN, vectors, centroids,
        FEATURES=features, WIDTH=width, BLOCK=block,
    )  # fmt: skip
    return codes_GN, lowest_GN


@triton.jit
def assign_kernel(
    features, of_centroid, codes, lowest, vectors, centroids,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, WIDTH)
    present_N, present_K = n < vectors, k < centroids
    score_KN = tl.zeros((WIDTH, BLOCK), tl.float32)
    for f in tl.static_range(FEATURES):
        feature_N = tl.load(features + (g * FEATURES + f) * vectors + n, mask=present_N, other=0.0)
        factor_K = tl.load(of_centroid + (g * centroids + k) * FEATURES + f, mask=present_K, other=0.0)
        score_KN += factor_K[:, None] * feature_N[None, :]
    score_KN = tl.where(present_K[:, None], score_KN, float("inf"))
    code_N = tl.argmin(score_KN, axis=0, tie_break_left=True)
    tl.store(codes + g * vectors + n, code_N.to(tl.uint8), mask=present_N)
    tl.store(lowest + g * vectors + n, tl.min(score_KN, axis=0), mask=present_N)


def cluster_sums(features_GFN: Tensor, codes_GN: Tensor, centroids: int) -> Tensor:
    """Sums [G, F, K], float32, of the features, float32, of the vectors that share a code, an integer below K."""
    groups, features, vectors = features_GFN.shape
    features_GFN, codes_GN = features_GFN.contiguous(), codes_GN.contiguous()
    sums_GFK = torch.empty(groups, features, centroids, dtype=torch.float32, device=features_GFN.device)
    grid = groups, features, triton.cdiv(centroids, SUMMED_CENTROIDS)
    cluster_sums_kernel[grid](
        features_GFN, codes_GN, sums_GFK, vectors, centroids, WIDTH=SUMMED_CENTROIDS, BLOCK=SUMMED_VECTORS
    )
    return sums_GFK


@triton.jit
def cluster_sums_kernel(features, codes, sums, vectors, centroids, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    g, f = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    row = g * tl.num_programs(1) + f
    sum_KN = tl.zeros((WIDTH, BLOCK), tl.float32)
    for first in range(0, vectors, BLOCK):
        n = first + tl.arange(0, BLOCK)
        code_N = tl.load(codes + g * vectors + n, mask=n < vectors, other=0).to(tl.int32)
        feature_N = tl.load(features + row * vectors + n, mask=n < vectors, other=0.0)
        sum_KN += tl.where(code_N[None, :] == k[:, None], feature_N[None, :], 0.0)
    tl.store(sums + row * centroids + k, tl.sum(sum_KN, axis=1), mask=k < centroids)


def improve(x_GND: Tensor, features_GFN: Tensor, centroids_GKD: Tensor, iterations: int) -> Tensor:
    """`kmeans.improve`: EM steps from the given centroids; features_GFN as that makes them."""
    groups, vectors, dimension = x_GND.shape
    centroids = centroids_GKD.shape[1]
    x_GND, centroids_GKD = x_GND.contiguous(), centroids_GKD.clone(memory_format=torch.contiguous_format)
    of_centroid_GKF = torch.cat([-2 * centroids_GKD, centroids_GKD.square()], dim=-1)
    own_GN = (features_GFN[:, :dimension] * x_GND.mT).sum(1)
    for _ in range(iterations):
        codes_GN, lowest_GN = assign(features_GFN, of_centroid_GKF)
        sums_GFK = cluster_sums(features_GFN, codes_GN, centroids)
        move_kernel[(groups,)](
            x_GND, own_GN, lowest_GN, sums_GFK, centroids_GKD, of_centroid_GKF, vectors, centroids,
            DIMENSION=dimension, WIDTH=triton.next_power_of_2(centroids), BLOCK=COMPARED_VECTORS,
        )  # fmt: skip
    return centroids_GKD


@triton.jit
def move_kernel(
    x, own, lowest, sums, centroid, of_centroid, vectors, centroids,
    DIMENSION: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Centroids become the means of their vectors, the first without vectors the vector with the largest error."""
    g = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDTH)
    present_K = k < centroids
    is_empty_K = present_K
    for d in tl.static_range(DIMENSION):
        total_K = tl.load(sums + (g * 2 * DIMENSION + DIMENSION + d) * centroids + k, mask=present_K, other=0.0)
        is_empty_K = is_empty_K & ~(total_K > 0)
    first_empty = tl.min(tl.where(is_empty_K, k, WIDTH), axis=0)
    largest, worst = float("-inf"), 0
    if first_empty < WIDTH:
        for first in range(0, vectors, BLOCK):
            n = first + tl.arange(0, BLOCK)
            error_N = tl.load(lowest + g * vectors + n, mask=n < vectors, other=float("-inf"))
            error_N += tl.load(own + g * vectors + n, mask=n < vectors, other=0.0)
            here = tl.max(error_N, axis=0)
            worst = tl.where(here > largest, first + tl.argmax(error_N, axis=0, tie_break_left=True), worst)
            largest = tl.maximum(here, largest)
    for d in tl.static_range(DIMENSION):
        weighted_K = tl.load(sums + (g * 2 * DIMENSION + d) * centroids + k, mask=present_K, other=0.0)
        total_K = tl.load(sums + (g * 2 * DIMENSION + DIMENSION + d) * centroids + k, mask=present_K, other=0.0)
        at_K = (g * centroids + k) * DIMENSION + d
        old_K = tl.load(centroid + at_K, mask=present_K, other=0.0)
        # Where a dimension of a used centroid carries no weight, any value does: the old one stays.
        mean_K = tl.where(total_K > 0, tl.math.div_rn(weighted_K, tl.where(total_K > 0, total_K, 1.0)), old_K)
        new_K = tl.where(k == first_empty, tl.load(x + (g * vectors + worst) * DIMENSION + d), mean_K)
        tl.store(centroid + at_K, new_K, mask=present_K)
        factor = of_centroid + (g * centroids + k) * 2 * DIMENSION + d
        tl.store(factor, -2 * new_K, mask=present_K)
        tl.store(factor + DIMENSION, new_K * new_K, mask=present_K)


def drawn_seeds(x_GND: Tensor, weight_GND: Tensor, draws_GK: Tensor, resolution: float) -> Tensor:
    """`kmeans.drawn_seeds`, of at most MOST_DRAWN_FROM vectors a group."""
    groups, vectors, dimension = x_GND.shape
    x_GND, weight_GND, draws_GK = x_GND.contiguous(), weight_GND.contiguous(), draws_GK.contiguous()
    centroids = draws_GK.shape[1]
    seeds_GKD = torch.empty(groups, centroids, dimension, dtype=torch.float32, device=x_GND.device)
    block = triton.next_power_of_2(vectors)
    draw_kernel[(groups,)](
        x_GND, weight_GND, draws_GK, seeds_GKD, vectors, centroids,
        RESOLUTION=resolution, DIMENSION=dimension, BLOCK=block, num_warps=max(4, block // VECTORS_OF_A_WARP),
    )  # fmt: skip
    return seeds_GKD


@triton.jit
def draw_kernel(
    x, weight, draws, seeds, vectors, centroids,
    RESOLUTION: tl.constexpr, DIMENSION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    present_N = n < vectors
    at_N = (g * vectors + n) * DIMENSION
    error_N = tl.zeros((BLOCK,), tl.float32)
    for d in tl.static_range(DIMENSION):
        error_N += tl.load(weight + at_N + d, mask=present_N, other=0.0)
    for k in range(centroids):
        largest = tl.maximum(tl.max(error_N, axis=0), SMALLEST_NORMAL)
        running_N = tl.cumsum((tl.math.div_rn(error_N, error_N * 0 + largest) * RESOLUTION).to(tl.int64), axis=0)
        target = (tl.load(draws + g * centroids + k) * tl.max(running_N, axis=0).to(tl.float64)).to(tl.int64)
        drawn = tl.minimum(tl.sum((running_N <= target).to(tl.int32), axis=0), vectors - 1)
        distance_N = tl.zeros((BLOCK,), tl.float32)
        for d in tl.static_range(DIMENSION):
            seed = tl.load(x + (g * vectors + drawn) * DIMENSION + d)
            apart_N = tl.load(x + at_N + d, mask=present_N, other=0.0) - seed
            distance_N += tl.load(weight + at_N + d, mask=present_N, other=0.0) * (apart_N * apart_N)
            tl.store(seeds + (g * centroids + k) * DIMENSION + d, seed)
        # The first was drawn in proportion to its weight.
        error_N = tl.where(k == 0, distance_N, tl.minimum(error_N, distance_N))
