"""Decompositions in threads, while a space grows, against those in turn."""

from __future__ import annotations

import torch

from lqer.lowrank.spectra import SPACES_AHEAD, spectra_in_threads, spectra_in_turn

WIDTH, BLOCKS = 3, 7


def rows_of(matrix_DD, grown):
    """Of one block after another; `grown` gets the number of each as it is asked for."""
    for size in range(WIDTH, len(matrix_DD) + 1, WIDTH):
        grown.append(size // WIDTH)
        yield lambda size=size: matrix_DD[size - WIDTH : size, :size]


def symmetric():
    x_DD = torch.randn(WIDTH * BLOCKS, WIDTH * BLOCKS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x_DD + x_DD.T


def test_threads_find_what_is_found_in_turn():
    matrix_DD = symmetric()
    in_threads = list(spectra_in_threads(rows_of(matrix_DD, [])))
    assert len(in_threads) == BLOCKS
    for block, (one, other) in enumerate(zip(in_threads, spectra_in_turn(rows_of(matrix_DD, [])), strict=True), 1):
        assert torch.equal(one.projected_DD, matrix_DD[: block * WIDTH, : block * WIDTH])
        assert torch.equal(one.projected_DD, other.projected_DD)
        torch.testing.assert_close(one.values(), other.values())
        values_D, vectors_DD = one.eigenvectors()
        torch.testing.assert_close(vectors_DD * values_D @ vectors_DD.T, one.projected_DD)


def test_the_space_grows_some_blocks_ahead_and_no_further():
    grown, seen = [], []
    for spectrum in spectra_in_threads(rows_of(symmetric(), grown)):
        seen.append((len(spectrum.projected_DD) // WIDTH, len(grown)))
    assert seen == [(block, min(block + SPACES_AHEAD, BLOCKS)) for block in range(1, BLOCKS + 1)]


def test_in_turn_a_block_is_grown_once_it_is_asked_for():
    grown = []
    for block, _ in enumerate(spectra_in_turn(rows_of(symmetric(), grown)), 1):
        assert len(grown) == block
