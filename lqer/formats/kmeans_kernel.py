"""The two steps of `kmeans.py` on a GPU: nearest centroids without a tensor of all distances, and sums without atomics.

In PyTorch the distances [G, K, N] and the indicators of the codes go through memory several times, and they are K / D
times as large as the vectors. Here a program holds a tile of them in registers. Sums are taken in a fixed order, so
that every run gives the same bits. It imports triton: only for tensors on a GPU, or in Triton's interpreter.

Shapes: G groups, F features of a vector, N vectors of a group, K centroids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of a tile of K x N: four warps hold it in 32 registers a thread.
TILE = 4096
# Of a tile of centroids and vectors whose features are added up.
SUMMED_CENTROIDS, SUMMED_VECTORS = 16, 128


def assign(features_GFN: Tensor, of_centroid_GKF: Tensor) -> tuple[Tensor, Tensor]:
    """Of each vector, the k with the smallest Σ_f of_centroid_kf feature_f, the lowest among equals, and that sum.

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
