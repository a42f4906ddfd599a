"""Sharing out bits: against trying everything, and the properties that the result has.

Shapes: K energies of a linear.
"""

from __future__ import annotations

import itertools
import random
from functools import partial

import pytest
import torch

from lqer.formats import Int, MXInt, Passthrough
from lqer.lowrank.rank_allocation import Candidate, allocate, factor_bits, rank_step


def linear_bits(cost: int, rank: int) -> int:
    return cost * rank


def candidate(energies: list[float], step: int = 2, cost: int = 3) -> Candidate:
    return Candidate(
        torch.tensor(sorted(energies, reverse=True), dtype=torch.float64), step, partial(linear_bits, cost)
    )


def random_candidates(rng: random.Random, count: int = 3) -> dict[str, Candidate]:
    return {
        f"linear{i}": candidate(
            [rng.expovariate(1 / rng.choice([1, 1, 10])) for _ in range(rng.randint(1, 9))], 2, rng.randint(1, 9)
        )
        for i in range(count)
    }


def objective(candidates: dict[str, Candidate], ranks: dict[str, int]) -> float:
    return sum(float(c.energies_K[ranks[name] :].sum()) for name, c in candidates.items())


def bits(candidates: dict[str, Candidate], ranks: dict[str, int]) -> int:
    return sum(c.bits(ranks[name]) for name, c in candidates.items())


@pytest.mark.parametrize("seed", range(30))
def test_the_ranks_keep_the_budget_and_leave_no_room_for_another_step(seed):
    rng = random.Random(seed)
    candidates = random_candidates(rng)
    budget = rng.randint(0, 120)
    found = allocate(candidates, budget)
    assert found.bits == bits(candidates, found.ranks) <= budget
    for name, c in candidates.items():
        assert found.ranks[name] % 2 == 0
        assert found.ranks[name] <= len(c.energies_K)
        assert found.ranks[name] + 2 > c.most or found.bits + c.bits(2) > budget
    assert found.objective == pytest.approx(objective(candidates, found.ranks))


@pytest.mark.parametrize("seed", range(30))
def test_it_is_never_worse_than_a_uniform_rank(seed):
    rng = random.Random(seed)
    candidates = random_candidates(rng, count=5)
    budget = rng.randint(0, 200)
    found = allocate(candidates, budget)
    for rank in range(0, 10, 2):
        ranks = {name: min(rank, c.most) for name, c in candidates.items()}
        if bits(candidates, ranks) <= budget:
            assert found.objective <= objective(candidates, ranks) + 1e-12
            assert found.uniform_rank >= rank or rank > max(c.most for c in candidates.values())
    assert found.objective <= found.uniform_objective
    assert found.uniform_bits <= budget


@pytest.mark.parametrize("seed", range(20))
def test_with_steps_of_equal_cost_it_is_the_best_there_is(seed):
    rng = random.Random(seed)
    candidates = {f"linear{i}": candidate([rng.random() for _ in range(6)], 2, 3) for i in range(3)}
    budget = rng.randint(0, 60)
    everything = (dict(zip(candidates, ranks, strict=True)) for ranks in itertools.product(range(0, 7, 2), repeat=3))
    best = min(objective(candidates, ranks) for ranks in everything if bits(candidates, ranks) <= budget)
    assert allocate(candidates, budget).objective == pytest.approx(best)


def test_bits_go_where_the_errors_are():
    candidates = {"loud": candidate([8.0, 7.0, 6.0, 5.0]), "quiet": candidate([0.4, 0.3, 0.2, 0.1])}
    assert allocate(candidates, 12).ranks == {"loud": 4, "quiet": 0}
    assert allocate(candidates, 18).ranks == {"loud": 4, "quiet": 2}


def test_a_uniform_rank_that_greed_does_not_find_is_kept():
    """By gain per bit the second step of `cheap` comes before the first of `dear`, and then nothing fits any more."""
    cheap = Candidate(torch.tensor([10.0, 7.0], dtype=torch.float64), 1, partial(linear_bits, 4))
    dear = Candidate(torch.tensor([8.0, 0.0], dtype=torch.float64), 1, partial(linear_bits, 5))
    found = allocate({"cheap": cheap, "dear": dear}, 9)
    assert found.ranks == {"cheap": 1, "dear": 1}
    assert found.uniform_rank == 1
    assert found.objective == found.uniform_objective == 7


@pytest.mark.parametrize("number_format", [MXInt(8), MXInt(3), Int(bits=4, block_size=16), Passthrough("float16")])
@pytest.mark.parametrize("axes", [(0, 0), (1, 1)])
@pytest.mark.parametrize("rank", [0, 8, 16, 20])
def test_the_price_of_a_rank_is_what_is_stored(number_format, axes, rank):
    in_features, out_features = 40, 56
    stored = 0
    if rank:
        factors = (torch.randn(in_features, rank), torch.randn(rank, out_features))
        for factor, axis in zip(factors, axes, strict=True):
            quantized = number_format.quantize(factor, axis=axis)
            stored += quantized.code_bits + quantized.metadata_bits
    assert factor_bits((number_format, number_format), axes, in_features, out_features, rank) == stored


def test_steps_are_the_factors_blocks():
    assert rank_step((MXInt(8, block_size=32),) * 2) == 32
    assert rank_step((MXInt(8, block_size=32), Passthrough("float16"))) == 32
    assert rank_step((Passthrough("float16"),) * 2) == 8
