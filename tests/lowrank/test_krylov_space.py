"""The Krylov space of the low-rank solver, and which of its spaces are looked at when."""

from __future__ import annotations

import pytest
import torch

from lqer.lowrank.krylov_space import grow, looked_at, projected, start_vectors
from lqer.lowrank.metric import Metric


def test_the_basis_is_orthonormal_and_the_projected_matrix_is_that_of_the_basis():
    error_OI = torch.randn(96, 120, generator=torch.Generator().manual_seed(1))
    scale_I = torch.rand(120, generator=torch.Generator().manual_seed(2)) + 0.5
    basis_DO, images_DI = torch.empty(72, 96, dtype=torch.float64), torch.empty(72, 120)
    rows = grow(error_OI, Metric(scale_I=scale_I), start_vectors(24, 96, 0, error_OI.device), basis_DO, images_DI)
    *_, projected_DD = projected(rows, [24, 72], ahead=0)
    torch.testing.assert_close(basis_DO @ basis_DO.T, torch.eye(72, dtype=torch.float64), rtol=0, atol=1e-9)
    weighted_OI = error_OI.double() * scale_I.double()
    expected_DD = basis_DO @ weighted_OI @ weighted_OI.T @ basis_DO.T
    torch.testing.assert_close(projected_DD, expected_DD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("width", "largest", "rank", "at_once", "sizes"),
    [
        (24, 120, 32, 1, [48, 72, 96, 120]),
        (24, 120, 16, 1, [24, 48, 72, 96, 120]),
        (24, 120, 32, 2, [48, 96, 120]),
        (48, 240, 32, 2, [96, 192, 240]),
        (48, 48, 32, 2, [48]),
    ],
)
def test_spaces_that_hold_the_rank_are_looked_at_in_strides_and_the_largest_one(width, largest, rank, at_once, sizes):
    assert looked_at(width, largest, rank, at_once) == sizes


@pytest.mark.parametrize("ahead", [0, 160])
def test_blocks_of_the_next_space_are_asked_for_before_a_small_one_is_given(ahead):
    sizes = looked_at(width=24, largest=14 * 24, rank=32, at_once=2)
    whole_DD = torch.randn(336, 336, generator=torch.Generator().manual_seed(2))
    whole_DD = (whole_DD + whole_DD.T) / 2
    asked = []

    def rows():
        for size in range(24, 337, 24):
            asked.append(size)
            yield whole_DD[size - 24 : size, :size]

    for size, projected_DD in zip(sizes, projected(rows(), sizes, ahead), strict=True):
        assert torch.equal(projected_DD, whole_DD[:size, :size].double())
        assert asked[-1] == size + (48 if size < ahead else 0)
