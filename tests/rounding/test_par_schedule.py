from __future__ import annotations

import torch

from lqer.rounding.par_schedule import SOFT_FRACTIONS_10, SOFT_FRACTIONS_20, draw_batches, soft_fractions


def test_the_schedules_fall_to_half_a_percent():
    for fractions, rounds in ((SOFT_FRACTIONS_20, 20), (SOFT_FRACTIONS_10, 10)):
        assert len(fractions) == rounds
        assert list(fractions) == sorted(set(fractions), reverse=True)
        assert fractions[-1] == 0.005


def test_few_bits_take_the_long_schedule():
    assert [len(soft_fractions(bits)) for bits in (2, 3, 4, 6, 8)] == [20, 20, 20, 10, 10]


def test_a_step_never_sees_a_sequence_twice_and_all_are_used():
    batches = draw_batches(sequences=10, rounds=3, steps=50, batch_size=4, seed=0)
    assert batches.shape == (3, 50, 4)
    assert all(len(set(batch.tolist())) == 4 for batch in batches.flatten(0, 1))
    assert batches.unique().tolist() == list(range(10))


def test_the_seed_decides_the_batches():
    draw = [draw_batches(10, 2, 5, 4, seed) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


def test_a_batch_holds_no_more_than_there_is():
    assert draw_batches(sequences=3, rounds=1, steps=2, batch_size=4, seed=0).shape == (1, 2, 3)
