"""Paths that close to a ring."""

import pytest
import torch

from lqer.formats.rings import best_rings
from lqer.formats.viterbi import best_paths


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bits", "state_bits"), [(1, 6), (2, 6), (3, 7), (4, 6)])
def test_the_codes_around_the_ring_are_the_states_of_a_path(bits, state_bits):
    x_NP, table_S = normal(4, 24), normal(1 << state_bits, seed=1)
    codes_NP = best_rings(x_NP, table_S, bits)
    assert codes_NP.dtype == torch.uint8
    assert int(codes_NP.max()) < 1 << bits
    states_NP = torch.zeros(4, 24, dtype=torch.int64)
    for p in range(2 * 24):  # twice around, until the first states are complete
        before_N = states_NP[:, (p - 1) % 24]
        states_NP[:, p % 24] = (before_N << bits | codes_NP[:, p % 24]) % (1 << state_bits)
    free_N = (x_NP - table_S[best_paths(x_NP, table_S, bits)]).square().sum(1)
    ring_N = (x_NP - table_S[states_NP]).square().sum(1)
    assert (ring_N >= free_N * 0.9999).all()
    assert float(ring_N.sum() / free_N.sum()) < 1.5


def test_a_ring_that_the_trellis_has_is_found():
    """Its own values are encoded without error."""
    table_S = normal(1 << 8, seed=1)
    codes_P = torch.randint(0, 4, (32,), generator=torch.Generator().manual_seed(2))
    states_P = sum(codes_P.roll(i) << (2 * i) for i in range(4))
    assert torch.equal(best_rings(table_S[states_P][None], table_S, 2)[0].long(), codes_P)
