"""Weighted k-means in batches: monotone, equal to an independent one, indifferent to how it is cut up."""

import numpy as np
import pytest
import torch

from lqer.formats import kmeans
from lqer.formats.kmeans import (
    cluster_sums,
    fit_centroids,
    initial_centroids,
    lowest_index,
    nearest_centroids,
    objective,
)

SEEDS = ("kmeans++", "mahalanobis", "cdf")


def problem(groups=5, vectors=120, dimension=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_GND = torch.randn(groups, vectors, dimension, generator=generator) ** 3
    weight_GND = torch.rand(groups, vectors, dimension, generator=generator) * 10 + 0.01
    return x_GND, weight_GND


def seeds_for(dimension):
    return [seeds for seeds in SEEDS if dimension == 1 or seeds != "cdf"]


@pytest.mark.parametrize(("dimension", "seeds"), [(d, seeds) for d in (1, 2, 4) for seeds in seeds_for(d)])
def test_no_step_raises_the_objective(dimension, seeds):
    x_GND, weight_GND = problem(dimension=dimension)
    last_G = torch.full((len(x_GND),), torch.inf, dtype=torch.float64)
    for iterations in range(25):
        centroids_GKD = fit_centroids(x_GND, weight_GND, 16, seeds, iterations)
        now_G = objective(x_GND, weight_GND, centroids_GKD)
        assert (now_G <= last_G * (1 + 1e-6)).all()
        last_G = now_G


def test_no_step_raises_the_objective_while_centroids_are_empty():
    x_GND = torch.zeros(2, 200, 1)
    x_GND[:, :20, 0] = torch.linspace(-1, 1, 20)
    last = torch.inf
    for iterations in range(12):
        now = objective(x_GND, torch.ones(1), fit_centroids(x_GND, torch.ones(1), 8, "cdf", iterations)).sum()
        assert now <= last * (1 + 1e-6)
        last = now
    start = objective(x_GND, torch.ones(1), fit_centroids(x_GND, torch.ones(1), 8, "cdf", 0)).sum()
    assert last < 0.2 * start  # six of the eight seeds were the same zero


def test_as_many_centroids_as_values_leave_no_error():
    x_GND = torch.tensor([0.0] * 50 + [1.0, -2.0, 3.0]).view(1, -1, 1)
    centroids_GKD = fit_centroids(x_GND, torch.ones(1), 4, "cdf", 10)
    assert centroids_GKD.flatten().tolist() == [-2.0, 0.0, 1.0, 3.0]


def naive_em(x_ND, weight_ND, centroids_KD, iterations):
    for _ in range(iterations):
        distance_NK = (weight_ND[:, None] * (x_ND[:, None] - centroids_KD[None]) ** 2).sum(-1)
        codes_N = distance_NK.argmin(1)
        for k in range(len(centroids_KD)):
            mine = codes_N == k
            if mine.any():
                centroids_KD[k] = (weight_ND[mine] * x_ND[mine]).sum(0) / weight_ND[mine].sum(0)
    return centroids_KD


@pytest.mark.parametrize("dimension", [2, 4])
def test_it_is_the_textbook_algorithm_with_a_weight_per_dimension(dimension):
    x_GND, weight_GND = problem(dimension=dimension)
    seeds_GKD = fit_centroids(x_GND, weight_GND, 8, "mahalanobis", 0)
    found_GKD = fit_centroids(x_GND, weight_GND, 8, "mahalanobis", 12)
    arrays = (tensor.double().numpy() for tensor in (x_GND, weight_GND, seeds_GKD, found_GKD))
    for x_ND, weight_ND, seeds_KD, found_KD in zip(*arrays, strict=True):
        np.testing.assert_allclose(found_KD, naive_em(x_ND, weight_ND, seeds_KD.copy(), 12), rtol=1e-4, atol=1e-5)


def test_it_agrees_with_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    x_GND, weight_GND = problem(vectors=400)
    weight_GN1 = weight_GND[..., :1]
    seeds_GKD = fit_centroids(x_GND, weight_GN1, 6, "mahalanobis", 0)
    found_GKD = fit_centroids(x_GND, weight_GN1, 6, "mahalanobis", 200)
    arrays = (tensor.double().numpy() for tensor in (x_GND, weight_GN1, seeds_GKD, found_GKD))
    for x_ND, weight_N1, seeds_KD, found_KD in zip(*arrays, strict=True):
        oracle = cluster.KMeans(6, init=seeds_KD, n_init=1, max_iter=200, tol=0)
        oracle.fit(x_ND, sample_weight=weight_N1[:, 0])
        np.testing.assert_allclose(found_KD, oracle.cluster_centers_, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dimension", [1, 2, 4])
@pytest.mark.parametrize("elements", [1, 700, 10_000])
def test_chunks_do_not_change_the_result(monkeypatch, dimension, elements):
    x_GND, weight_GND = problem(dimension=dimension)
    whole = fit_centroids(x_GND, weight_GND, 16, iterations=5)
    codes = nearest_centroids(x_GND, weight_GND, whole)
    monkeypatch.setattr(kmeans, "CHUNK_ELEMENTS", {"cpu": elements})
    torch.testing.assert_close(fit_centroids(x_GND, weight_GND, 16, iterations=5), whole)
    assert torch.equal(nearest_centroids(x_GND, weight_GND, whole), codes)


@pytest.mark.parametrize("seeds", SEEDS)
def test_vectors_without_weight_are_not_there(seeds):
    x_GND, weight_GND = problem(dimension=1)
    padding = (0, 0, 0, 37)
    padded_GND = torch.nn.functional.pad(x_GND, padding, value=9.0)
    expected = fit_centroids(x_GND, weight_GND, 4, seeds, 10)
    found = fit_centroids(padded_GND, torch.nn.functional.pad(weight_GND, padding), 4, seeds, 10)
    torch.testing.assert_close(found, expected)


def test_the_lowest_index_is_that_of_argmin():
    scores = torch.randint(0, 9, (3, 256, 40), generator=torch.Generator().manual_seed(0)).float() - 4
    assert np.array_equal(lowest_index(scores, 1).numpy(), scores.numpy().argmin(1))
    assert lowest_index(torch.zeros(4, 2), 0).tolist() == [0, 0]


def test_sums_are_those_of_the_vectors_with_a_code():
    x_GFN = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0))
    codes_GN = torch.randint(0, 7, (3, 50), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    sums_GFK = cluster_sums(x_GFN, codes_GN, 8)
    assert torch.equal(sums_GFK[1, 2, 7], torch.tensor(0.0))
    torch.testing.assert_close(sums_GFK[1, 2, 3], x_GFN[1, 2, codes_GN[1] == 3].sum())


def test_cdf_seeds_are_evenly_spaced_order_statistics():
    x_GND = torch.randperm(101, generator=torch.Generator().manual_seed(0)).float().view(1, -1, 1)
    assert fit_centroids(x_GND, torch.ones(1), 5, "cdf", 0).flatten().tolist() == [0, 25, 50, 75, 100]


def test_mahalanobis_seeds_run_from_the_middle_to_the_rim_in_units_of_the_spread():
    x_GND = torch.randn(1, 500, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([100.0, 0.01]) + 3
    seeds_KD = fit_centroids(x_GND, torch.ones(1), 6, "mahalanobis", 0)[0].double()
    x_ND = x_GND[0].double()
    inverse_DD = torch.linalg.inv(torch.cov(x_ND.T))
    centred_KD, centred_ND = seeds_KD - x_ND.mean(0), x_ND - x_ND.mean(0)
    of_seeds = torch.einsum("kd,de,ke->k", centred_KD, inverse_DD, centred_KD)
    of_all = torch.einsum("kd,de,ke->k", centred_ND, inverse_DD, centred_ND)
    torch.testing.assert_close(of_seeds, of_all.sort().values[[0, 100, 200, 299, 399, 499]], rtol=1e-2, atol=1e-2)


def test_kmeans_plus_plus_finds_every_far_cluster():
    generator = torch.Generator().manual_seed(0)
    centres_KD = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [100.0, 100.0]])
    x_GND = (centres_KD.repeat(50, 1) + torch.randn(200, 2, generator=generator)).expand(20, -1, -1)
    seeds_GKD = fit_centroids(x_GND, torch.ones(1), 4, "kmeans++", 0)
    assert all((seeds_KD.round(decimals=-2).unique(dim=0).shape[0]) == 4 for seeds_KD in seeds_GKD)


def test_kmeans_plus_plus_draws_in_proportion_to_the_squared_distance():
    # From 0 the others lie at 1 and 9 in squared distance, from 1 at 1 and 4.
    x_GND = torch.tensor([0.0, 1.0, 3.0]).view(1, 3, 1).expand(4000, -1, -1)
    draws_GK = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first_G, second_G = initial_centroids(x_GND, torch.ones(1).expand_as(x_GND), 2, "kmeans++", draws_GK).squeeze(-1).T
    assert (first_G == 1).float().mean() == pytest.approx(1 / 3, abs=0.03)
    assert (second_G[first_G == 0] == 3).float().mean() == pytest.approx(9 / 10, abs=0.03)
    assert (second_G[first_G == 1] == 3).float().mean() == pytest.approx(4 / 5, abs=0.04)


def test_a_seed_decides_the_draw():
    x_GND, weight_GND = problem()
    first, again, other = (fit_centroids(x_GND, weight_GND, 8, iterations=0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("seeds", SEEDS)
def test_groups_of_one_value_are_fitted_by_it(seeds):
    x_GND = torch.tensor([0.0, 2.5]).view(2, 1, 1).expand(2, 30, 1)
    centroids_GKD = fit_centroids(x_GND, torch.ones(1), 4, seeds, 5)
    assert centroids_GKD.isfinite().all()
    assert objective(x_GND, torch.ones(1), centroids_GKD).tolist() == [0, 0]


def test_cdf_seeds_for_vectors_are_refused():
    with pytest.raises(ValueError, match="seeds 'cdf' order single values, found vectors of 2"):
        fit_centroids(*problem(), 4, "cdf")
