"""The search for paths through a trellis, against all paths."""

import itertools

import pytest
import torch

from lqer.formats.viterbi import best_paths


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def follows(state: int, code: int, bits: int, state_bits: int) -> int:
    return (state << bits | code) % (1 << state_bits)


def least_error(x_P, table_S, bits: int, state_bits: int, overlap: int | None = None) -> float:
    """Over every start and every sequence of codes."""
    least = float("inf")
    starts = range(1 << (state_bits - bits)) if overlap is None else [overlap]
    for start in starts:
        for codes in itertools.product(range(1 << bits), repeat=len(x_P)):
            state, error = start, 0.0
            for x, code in zip(x_P.tolist(), codes, strict=True):
                state = follows(state, code, bits, state_bits)
                error += (x - float(table_S[state])) ** 2
            if overlap is None or state % (1 << (state_bits - bits)) == overlap:
                least = min(least, error)
    return least


def is_path(states_P, bits: int, state_bits: int) -> bool:
    pairs = itertools.pairwise(states_P.tolist())
    return all(after == follows(before, after % (1 << bits), bits, state_bits) for before, after in pairs)


class TestBestPaths:
    @pytest.mark.parametrize(("bits", "state_bits", "positions"), [(1, 4, 8), (2, 4, 5), (2, 5, 4), (3, 4, 3)])
    def test_no_path_is_better(self, bits, state_bits, positions):
        x_NP, table_S = normal(3, positions), normal(1 << state_bits, seed=1)
        states_NP = best_paths(x_NP, table_S, bits)
        errors_N = (x_NP - table_S[states_NP]).square().sum(1)
        for x_P, states_P, error in zip(x_NP, states_NP, errors_N, strict=True):
            assert is_path(states_P, bits, state_bits)
            assert float(error) == pytest.approx(least_error(x_P, table_S, bits, state_bits), rel=1e-5)

    @pytest.mark.parametrize(("bits", "state_bits", "positions"), [(1, 3, 8), (2, 4, 5), (2, 5, 5), (4, 6, 3)])
    def test_no_path_that_starts_and_ends_with_the_overlap_is_better(self, bits, state_bits, positions):
        x_NP, table_S = normal(3, positions), normal(1 << state_bits, seed=1)
        overlap_N = torch.tensor([0, 1, (1 << (state_bits - bits)) - 1])
        states_NP = best_paths(x_NP, table_S, bits, overlap_N)
        errors_N = (x_NP - table_S[states_NP]).square().sum(1)
        assert torch.equal(states_NP[:, 0] >> bits, overlap_N)
        assert torch.equal(states_NP[:, -1] % (1 << (state_bits - bits)), overlap_N)
        for x_P, overlap, error in zip(x_NP, overlap_N.tolist(), errors_N, strict=True):
            assert float(error) == pytest.approx(least_error(x_P, table_S, bits, state_bits, overlap), rel=1e-5)

    def test_sequences_do_not_depend_on_each_other(self):
        x_NP, table_S = normal(150, 6), normal(1 << 12, seed=1)
        states_NP = best_paths(x_NP, table_S, 2)
        assert torch.equal(best_paths(x_NP[140:], table_S, 2), states_NP[140:])

    def test_threads_share_the_sequences_and_stay_as_many(self):
        x_NP, table_S = normal(70, 6), normal(1 << 8, seed=1)
        usual, found = torch.get_num_threads(), []
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                found.append(best_paths(x_NP, table_S, 2))
                assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(usual)
        assert torch.equal(*found)

    def test_no_sequence_gives_no_path(self):
        assert best_paths(normal(0, 6), normal(16), 2).shape == (0, 6)
