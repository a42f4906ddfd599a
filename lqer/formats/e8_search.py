"""Exact nearest-point search in the two E8 codebooks (e8.py).

For y = x - δ/4 the nearest σ·a maximises 2<y, σ·a> - |a|². Where the parity of y's signs is right σ are those
signs; otherwise flipping the sign of the smallest |y| costs least. The 227 vectors are seven classes of all
permutations of one multiset, and by the rearrangement inequality a class's best member has its entries sorted as |y|
is: its score is a sum of the largest |y|. The 29 are looked at one by one, only where a bound over all 56 leaves them a
chance. Of equally near points the one with the lowest code is found, as by argmin over the 65536 distances. A GPU does
the same in one kernel (e8_kernel.py), with all of the 29.

Shapes: V vectors, 8 coordinates, P points, K rows, C classes, M vectors that may have a row of |a|² = 12.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lqer.formats.e8 import CLASSES, DIMENSION, ROWS, absolute_rows, e8_one_bit_points

# Vectors at a time: temporaries of a chunk stay within the cache.
CHUNK = 1 << 14


def nearest_e8_one_bit(x_V8: Tensor) -> Tensor:
    """int64 codes [V] of the nearest points of the E8 1-bit codebook; the lowest code of equally near ones."""
    points_8P, offset_P = _transposed_one_bit(x_V8.device)
    return torch.cat([torch.addmm(offset_P, x_8, points_8P).argmax(-1) for x_8 in x_V8.split(CHUNK)])


def nearest_e8p(x_V8: Tensor) -> Tensor:
    """int64 codes [V] of the nearest E8P points of float32 vectors [V, 8]; NaN is read as 0."""
    if x_V8.is_cuda:
        from lqer.formats.e8_kernel import nearest

        return nearest(x_V8)
    return torch.cat([_nearest_e8p(x_8) for x_8 in x_V8.split(CHUNK)])


@lru_cache
def _transposed_one_bit(device: torch.device) -> tuple[Tensor, Tensor]:
    """Points [8, P] and -|p|² / 2 [P]: <x, p> - |p|² / 2 is largest for the nearest."""
    points_P8 = e8_one_bit_points(device)
    return points_P8.T, -points_P8.square().sum(-1) / 2


def _nearest_e8p(x_V8: Tensor) -> Tensor:
    tables = _search_tables(x_V8.device)
    x_8V = x_V8.T.nan_to_num(nan=0.0).contiguous()
    y_82V = x_8V.unsqueeze(1) - tables.shift_21
    magnitude_82V = y_82V.abs()
    odd_2V = _parity(y_82V < 0)
    score_2V, class_2V, row_2V = _best_row(magnitude_82V, odd_2V, tables)

    # |x - point|² = |x|² - δ/2 sum(x) + 1/2 - score: the larger of score + δ/2 sum(x) is nearer.
    tilt_V = x_8V.sum(0)
    minus_V = score_2V[1] > score_2V[0] + tilt_V
    magnitude_8V = torch.where(minus_V, magnitude_82V[:, 1], magnitude_82V[:, 0])
    negative_8V = torch.where(minus_V, y_82V[:, 1], y_82V[:, 0]) < 0
    odd_V = torch.where(minus_V, odd_2V[1], odd_2V[0])
    class_V = torch.where(minus_V, class_2V[1], class_2V[0])
    row_V = torch.where(minus_V, row_2V[1], row_2V[0])

    digits_8V = _sorted_like(magnitude_8V, class_V, tables)
    digits_8V = torch.where(row_V < 0, digits_8V, tables.digits_8K[:, row_V.clamp(min=0)])
    negative_8V ^= _flip(magnitude_8V, negative_8V, digits_8V, odd_V, tables)
    row_V = tables.row_of_pattern[(tables.powers_of_3 @ digits_8V).to(torch.int64)]
    signs_V = (tables.sign_bits @ negative_8V.to(torch.float32)).to(torch.int64)
    return (minus_V.to(torch.int64) << 15) | (row_V << 7) | signs_V


def _best_row(magnitude_82V: Tensor, odd_2V: Tensor, tables: SearchTables) -> tuple[Tensor, Tensor, Tensor]:
    """Best score 2<y, σ·a> - |a|² [2, V] over the rows; its class, and the row itself if it has |a|² = 12, else -1."""
    u_8 = _sorted_descending(magnitude_82V)
    total_2V = magnitude_82V.sum(0)
    flip_cost_2V = 2 * u_8[7]
    even_2V = total_2V - flip_cost_2V * odd_2V
    odd_total_2V = total_2V - flip_cost_2V * ~odd_2V
    one, two = 2 * u_8[0], 2 * u_8[1]
    top_2 = one + two
    top_3 = top_2 + 2 * u_8[2]
    top_4 = top_3 + 2 * u_8[3]
    scores_C2V = torch.stack(
        [
            even_2V - 2,
            odd_total_2V + (one - 4),
            even_2V + (top_2 - 6),
            odd_total_2V + (top_3 - 8),
            even_2V + (2 * one - 8),
            even_2V + (top_4 - 10),
            odd_total_2V + (2 * one + two - 10),
        ]
    )
    score_2V, class_2V = scores_C2V.max(0)
    row_2V = torch.full_like(class_2V, -1)
    chance_2V = odd_total_2V + (top_4 + 2 * u_8[4] - 12) > score_2V
    chosen = chance_2V.nonzero(as_tuple=True)
    magnitude_M8 = magnitude_82V[:, chosen[0], chosen[1]].T
    weighted_MK8 = magnitude_M8.unsqueeze(1) * tables.norm_12_K8
    flip_cost_MK = weighted_MK8.amin(-1) * 4 * ~odd_2V[chosen].unsqueeze(-1)
    score_M, best_M = (2 * weighted_MK8.sum(-1) - 12 - flip_cost_MK).max(-1)
    better_M = score_M > score_2V[chosen]
    score_2V[chosen] = torch.where(better_M, score_M, score_2V[chosen])
    row_2V[chosen] = torch.where(better_M, best_M + (ROWS - len(tables.norm_12_K8)), -1)
    return score_2V, class_2V, row_2V


def _sorted_like(magnitude_8V: Tensor, class_V: Tensor, tables: SearchTables) -> Tensor:
    """float32 digits [8, V] of the member of a class whose entries are sorted as the magnitudes are.

    Of equal magnitudes the later coordinate counts as the larger, which gives the lexicographically first member.
    """
    greater_28V = magnitude_8V[tables.pair_first] > magnitude_8V[tables.pair_second]
    rank_8V = torch.addmm(tables.rank_without_pairs_81, tables.rank_of_pairs, greater_28V.to(torch.float32))
    fives_V, nonzero_V = tables.fives[class_V], tables.nonzero[class_V]
    return (rank_8V < fives_V).to(torch.float32) + (rank_8V < nonzero_V)


def _flip(magnitude_8V: Tensor, negative_8V: Tensor, digits_8V: Tensor, odd_V: Tensor, tables: SearchTables) -> Tensor:
    """Which sign to change [8, V], at most one per vector: the cheapest where the parity of the signs is wrong.

    Of equally cheap ones the one that leaves the lowest sign bits: the first negative, else the last positive.
    """
    wrong_V = odd_V ^ (digits_8V == 1).sum(0).bitwise_and(1).to(torch.bool)
    cost_8V = magnitude_8V * (digits_8V + 0.5)
    cheapest_8V = cost_8V == cost_8V.amin(0)
    preference_8V = torch.where(negative_8V, tables.negative_preference_81, tables.positive_preference_81)
    preference_8V = torch.where(cheapest_8V, preference_8V, -1)
    return (preference_8V == preference_8V.amax(0)) & wrong_V


def _parity(negative_8: Tensor) -> Tensor:
    four = negative_8[:4] ^ negative_8[4:]
    two = four[:2] ^ four[2:]
    return two[0] ^ two[1]


def _sorted_descending(x_8: Tensor) -> list[Tensor]:
    """Batcher's sorting network over the first axis: 19 exchanges, each one minimum and one maximum."""
    rows = list(x_8.unbind(0))
    for i, j in _NETWORK:
        rows[i], rows[j] = torch.maximum(rows[i], rows[j]), torch.minimum(rows[i], rows[j])
    return rows


_NETWORK = (
    (0, 1), (2, 3), (4, 5), (6, 7), (0, 2), (1, 3), (4, 6), (5, 7), (1, 2), (5, 6),
    (0, 4), (1, 5), (2, 6), (3, 7), (2, 4), (3, 5), (1, 2), (3, 4), (5, 6),
)  # fmt: skip


class SearchTables:
    """Constants of the search, on a device."""

    def __init__(self, device: torch.device):
        rows = absolute_rows()
        digits_K8 = torch.tensor(rows, dtype=torch.float32)
        powers_8 = 3.0 ** torch.arange(DIMENSION)
        row_of_pattern = torch.zeros(3**DIMENSION, dtype=torch.int64)
        row_of_pattern[(digits_K8 @ powers_8).to(torch.int64)] = torch.arange(ROWS)
        pairs = torch.triu_indices(DIMENSION, DIMENSION, offset=1)
        # The rank of i is how many coordinates are larger: those before it that are greater, those after it that are
        # not smaller.
        rank_of_pairs = torch.zeros(DIMENSION, pairs.shape[1])
        rank_of_pairs[pairs[1], torch.arange(pairs.shape[1])] = 1
        rank_of_pairs[pairs[0], torch.arange(pairs.shape[1])] = -1
        later_81 = torch.arange(DIMENSION - 1, -1, -1, dtype=torch.float32).unsqueeze(1)

        self.shift_21 = torch.tensor([[0.25], [-0.25]]).to(device)
        self.digits_8K = digits_K8.T.contiguous().to(device)
        self.norm_12_K8 = (digits_K8[(digits_K8 + 0.5).square().sum(-1) == 12] + 0.5).to(device)
        self.powers_of_3 = powers_8.to(device)
        self.row_of_pattern = row_of_pattern.to(device)
        self.pair_first, self.pair_second = pairs.to(device)
        self.rank_of_pairs, self.rank_without_pairs_81 = rank_of_pairs.to(device), later_81.to(device)
        self.fives = torch.tensor([float(fives) for fives, _ in CLASSES], device=device)
        self.nonzero = torch.tensor([float(fives + threes) for fives, threes in CLASSES], device=device)
        self.sign_bits = torch.tensor([64.0, 32, 16, 8, 4, 2, 1, 0], device=device)
        self.negative_preference_81 = (DIMENSION + later_81).to(device)
        self.positive_preference_81 = (DIMENSION - 1 - later_81).to(device)


@lru_cache
def _search_tables(device: torch.device) -> SearchTables:
    return SearchTables(device)
