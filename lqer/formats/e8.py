"""Two codebooks in the E8 lattice (after QuIP#, arXiv 2402.04396); lqer/formats/e8_search.py finds nearest points.

E8P, 2^16 points of 8 coordinates. Take 256 vectors a of positive half-integers,

    all with |a|² <= 10                      1 + 8 + 28 + 64 + 126 = 227 of them, by |a|² = 2, 4, 6, 8, 10
    29 of the 56 with five 3/2, three 1/2    |a|² = 12

give each the 2^7 sign patterns σ that make the sum of σ·a even, and shift by a quarter either way:

    point = σ·a + δ/4 (1, .., 1),   δ = +1 or -1            code = (δ < 0) << 15 | row of a << 7 | signs of 0..6

(sign bit 1 is negative, coordinate 0 in bit 6; the sign of coordinate 7 follows from the parity). Rows are ordered by
|a|², threes before a five, then lexicographically.

E8 1-bit, 2^8 points: the lattice points with |v|² <= 2 (zero and 240 roots) and fifteen of the sixteen ±2e_i, in this
order; roots and the others in lexicographic order, without (0, .., 0, 2).

Shapes: V vectors, 8 coordinates, P points, K rows.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from torch import Tensor

DIMENSION = 8
ROWS = 256
POINTS = 1 << 16
LARGEST_COORDINATE = 2.75

# Classes of rows that are closed under permutation, in the order of the table: (number of 5/2, number of 3/2).
CLASSES = ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (0, 4), (1, 1))
# Where the 29 vectors with |a|² = 12 have their three 1/2. Any 29 of the 56 would serve; these are those of the
# published codebook, so that the points are the same.
HALVES_OF_NORM_12 = (
    "012 013 014 023 045 046 047 056 057 067 123 146 147 156 157 167 "
    "237 245 246 247 256 257 267 345 346 347 356 357 367"
)


@lru_cache
def absolute_rows() -> tuple[tuple[int, ...], ...]:
    """The 256 vectors a as digits d, a = d + 1/2."""
    rows: list[tuple[int, ...]] = []
    for fives, threes in CLASSES:
        digits = (2,) * fives + (1,) * threes + (0,) * (DIMENSION - fives - threes)
        rows += sorted(set(itertools.permutations(digits)))
    halves = [{int(position) for position in triple} for triple in HALVES_OF_NORM_12.split()]
    rows += sorted(tuple(0 if i in triple else 1 for i in range(DIMENSION)) for triple in halves)
    return tuple(rows)


def decode_e8p(codes_V: Tensor) -> Tensor:
    """float32 points [*V, 8] of E8P codes [*V] (any integer dtype), from the table of 256 rows."""
    digits_K8 = torch.tensor(absolute_rows(), device=codes_V.device)
    codes_V = codes_V.to(torch.int64)
    digits_V8 = digits_K8[(codes_V >> 7) & 0xFF]
    negative_V7 = (codes_V.unsqueeze(-1) >> torch.arange(6, -1, -1, device=codes_V.device)) & 1
    # The sum of σ·a is 4 plus the digits less the negatives' 2a, which is odd for each.
    last_V = (digits_V8.sum(-1) + negative_V7.sum(-1)) & 1
    negative_V8 = torch.cat([negative_V7, last_V.unsqueeze(-1)], dim=-1)
    shift_V = 0.25 - 0.5 * (codes_V >> 15 & 1).to(torch.float32)
    return (digits_V8 + 0.5) * (1 - 2 * negative_V8) + shift_V.unsqueeze(-1)


@lru_cache
def e8p_points(device: torch.device) -> Tensor:
    """All E8P points, float32 [65536, 8], in the order of their codes."""
    return decode_e8p(torch.arange(POINTS, device=device))


@lru_cache
def e8_one_bit_points(device: torch.device) -> Tensor:
    """The 256 points of the E8 1-bit codebook, float32 [256, 8]."""
    doubled = [
        tuple(vector)
        for vector in itertools.product((-2, 0, 2), repeat=DIMENSION)
        if sum(abs(entry) for entry in vector) == 4
    ]
    doubled += [vector for vector in itertools.product((-1, 1), repeat=DIMENSION) if sum(vector) % 4 == 0]
    doubles = sorted(tuple(4 * sign * (i == j) for j in range(DIMENSION)) for i in range(DIMENSION) for sign in (-1, 1))
    doubles.remove((0,) * 7 + (4,))
    return torch.tensor([(0,) * DIMENSION, *sorted(doubled), *doubles], dtype=torch.float32, device=device) / 2
