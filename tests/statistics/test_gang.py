"""How a gang shares out windows and deals out linears."""

from __future__ import annotations

import pytest

from lqer.statistics import ALONE, Gang


def rank_of(rank: int, size: int) -> Gang:
    gang = Gang()
    gang.rank, gang.size = rank, size
    return gang


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_ranks_have_neighbouring_items_which_together_are_all(size):
    items = list(range(7))
    shares = [rank_of(rank, size).share(items) for rank in range(size)]
    assert [item for share in shares for item in share] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_longest_work_is_dealt_first_to_whoever_has_the_least():
    costs = {"q": 1.0, "o": 1.0, "gate": 4.0, "up": 4.0, "down": 16.0}
    assert [rank_of(rank, 2).deal(costs) for rank in range(2)] == [{"down"}, {"q", "o", "gate", "up"}]
    assert [rank_of(rank, 3).deal(costs) for rank in range(3)] == [{"down"}, {"gate", "q"}, {"up", "o"}]
    assert ALONE.deal(costs) == set(costs)
