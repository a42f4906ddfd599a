"""How the solver's work is spread over a GPU and the CPU; its solutions are tested with the other solver's."""

from __future__ import annotations

from lqer.lowrank.krylov import _one_ahead


def test_a_block_is_handed_on_once_the_next_one_is_started():
    started = []

    def blocks():
        for index in range(4):
            started.append(index)
            yield index

    seen = [(block, list(started)) for block in _one_ahead(blocks())]
    assert seen == [(0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2, 3]), (3, [0, 1, 2, 3])]
