"""The steps of k-means on a GPU against those in PyTorch; without a GPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from lqer.formats import kmeans
from lqer.formats.kmeans_kernel import assign, cluster_sums, drawn_seeds, improve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (groups, vectors, centroids, dimension): one tile of vectors and several, centroids that fill no power of two.
CASES = [(3, 40, 4, 1), (2, 300, 16, 2), (1, 70, 256, 4), (2, 50, 7, 2)]


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize(("groups", "vectors", "centroids", "dimension"), CASES)
def test_every_vector_gets_a_nearest_centroid(groups, vectors, centroids, dimension):
    x_GND, weight_GND = normal(groups, vectors, dimension, seed=0), normal(groups, vectors, dimension, seed=1).exp()
    centroids_GKD = normal(groups, centroids, dimension, seed=2)
    distance_GNK = (weight_GND.unsqueeze(2) * (x_GND.unsqueeze(2) - centroids_GKD.unsqueeze(1)).square()).sum(-1)
    of_centroid_GKF = torch.cat([-2 * centroids_GKD, centroids_GKD.square()], dim=-1)
    codes_GN, lowest_GN = assign(kmeans.features_of(x_GND, weight_GND), of_centroid_GKF)
    assert codes_GN.dtype == torch.uint8
    nearest_GN = distance_GNK.gather(2, codes_GN.long().unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(nearest_GN, distance_GNK.amin(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lowest_GN, nearest_GN - (weight_GND * x_GND.square()).sum(-1), rtol=1e-4, atol=1e-4)


def test_the_lowest_of_equal_centroids_wins():
    codes_GN, lowest_GN = assign(torch.ones(1, 2, 20, device=DEVICE), torch.ones(1, 16, 2, device=DEVICE))
    assert not codes_GN.any()
    assert (lowest_GN == 2).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize(("groups", "vectors", "centroids", "dimension"), CASES)
def test_sums_are_those_of_the_vectors_with_a_code(groups, vectors, centroids, dimension, dtype):
    features_GFN = normal(groups, 2 * dimension, vectors, seed=0)
    # The last code is that of no vector.
    codes_GN = torch.arange(groups * vectors, device=DEVICE).mul(7).remainder(centroids - 1).view(groups, vectors)
    indicator_GNK = torch.nn.functional.one_hot(codes_GN, centroids).to(torch.float32)
    found_GFK = cluster_sums(features_GFN, codes_GN.to(dtype), centroids)
    torch.testing.assert_close(found_GFK, features_GFN @ indicator_GNK, rtol=1e-4, atol=1e-4)
    assert not found_GFK[..., -1].any()


def problem(groups, vectors, dimension):
    """Vectors and weights of k-means, on the CPU."""
    return normal(groups, vectors, dimension, seed=0).cpu(), normal(groups, vectors, dimension, seed=1).exp().cpu()


def improved_in_both_ways(x_GND, weight_GND, start_GKD, iterations):
    features_GFN = kmeans.features_of(x_GND, weight_GND).to(DEVICE)
    found_GKD = improve(x_GND.to(DEVICE), features_GFN, start_GKD.to(DEVICE), iterations)
    return found_GKD.cpu(), kmeans.improve(x_GND, weight_GND, start_GKD, iterations)


@pytest.mark.parametrize(("groups", "vectors", "centroids", "dimension"), CASES)
@pytest.mark.parametrize("iterations", [0, 1])
def test_a_step_moves_centroids_as_in_pytorch(groups, vectors, centroids, dimension, iterations):
    x_GND, weight_GND = problem(groups, vectors, dimension)
    # Values that repeat leave centroids without vectors; a dimension without weight keeps its value.
    x_GND[:, ::3] = x_GND[:, :1]
    weight_GND[0, :, -1] = 0
    start_GKD = x_GND[:, torch.arange(centroids) % vectors]
    ways = improved_in_both_ways(x_GND, weight_GND, start_GKD, iterations)
    torch.testing.assert_close(*ways, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("groups", "vectors", "centroids", "dimension"), [case for case in CASES if case[1] > case[2]])
def test_many_steps_end_as_in_pytorch(groups, vectors, centroids, dimension):
    x_GND, weight_GND = problem(groups, vectors, dimension)
    ways = improved_in_both_ways(x_GND, weight_GND, x_GND[:, :centroids], 8)
    torch.testing.assert_close(*ways, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("groups", "vectors", "centroids", "dimension"), CASES)
def test_the_same_seeds_are_drawn(groups, vectors, centroids, dimension):
    x_GND, weight_GND = problem(groups, vectors, dimension)
    weight_GND[0, 5:] = 0
    draws_GK = torch.rand(groups, centroids, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected_GKD = kmeans.drawn_seeds(x_GND, weight_GND, draws_GK)
    found_GKD = drawn_seeds(x_GND.to(DEVICE), weight_GND.to(DEVICE), draws_GK.to(DEVICE), kmeans.DRAW_RESOLUTION)
    # Where a running sum differs in the last bit, a draw may end one vector further.
    assert (found_GKD.cpu() != expected_GKD).float().mean() <= 0.02
