"""The matrices that Hadamard transforms of any length are products of.

n = 2^p k splits into H_n = H_k ⊗ H_(2^p), or, into matrices of moderate size, H_n = O ⊗ H_B with B ≤ 2^p. k is the
smallest multiple of n's odd part for which Paley's constructions with a prime give a Hadamard matrix:

    I    k = q + 1,  q prime, q = 3 mod 4        12, 20, 24, 60, ..
    II   k = 2 (q + 1),  q prime, q = 1 mod 4    28, 36, 76, 124, ..

Where there is none up to 256 (172 = 4 · 43), k is the odd part and H_k the orthonormal Hartley matrix, with entries
(cos + sin)(2π i j / k) / sqrt(k): as flat as a Hadamard matrix up to a factor sqrt(2).

Shapes: K the small factor, A the outer and B the inner factor.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

# A small factor costs K multiplications an element; beyond this the odd part itself is cheaper or as good.
LARGEST_PALEY = 256


@lru_cache
def small_order(length: int) -> int:
    """Order k of the small factor: 1 for a power of two, else of a Paley matrix, or the odd part if there is none."""
    if length < 1:
        raise ValueError(f"length {length} of a Hadamard transform is not positive")
    odd = length >> (length & -length).bit_length() - 1
    if odd == 1:
        return 1
    order = 4 * odd
    while length % order == 0 and order <= LARGEST_PALEY:
        if _paley_prime(order):
            return order
        order *= 2
    return odd


def is_hadamard(length: int) -> bool:
    """Whether the transform of this length is a Hadamard matrix: its small factor is, unlike Hartley's."""
    order = small_order(length)
    return order == 1 or _paley_prime(order) != 0


@lru_cache
def small_factor(order: int) -> Tensor:
    """Orthonormal float64 (K, K): Paley's Hadamard matrix where there is one, else the Hartley matrix."""
    prime = _paley_prime(order)
    if prime == 0:
        index = torch.arange(order)
        angle_KK = (2 * math.pi / order) * (index[:, None] * index % order).to(torch.float64)
        return (angle_KK.cos() + angle_KK.sin()) / math.sqrt(order)
    residues = {i * i % prime for i in range(1, prime)}
    # Jacobsthal's matrix, the quadratic character of i - j; it is skew where -1 is no square (I), else symmetric (II).
    character = torch.tensor([0] + [1 if i in residues else -1 for i in range(1, prime)], dtype=torch.float64)
    index = torch.arange(prime)
    bordered = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    bordered[0, 0] = 0
    bordered[1:, 1:] = character[(index[:, None] - index) % prime]
    identity = torch.eye(prime + 1, dtype=torch.float64)
    if order == prime + 1:
        bordered[1:, 0] = -1
        return (bordered + identity) / math.sqrt(order)
    sums = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return (torch.kron(bordered, sums) + torch.kron(identity, diagonal)) / math.sqrt(order)


def _paley_prime(order: int) -> int:
    """The prime q from which Paley's first or second construction makes a Hadamard matrix of that order, or 0."""
    if _is_prime(order - 1) and (order - 1) % 4 == 3:
        return order - 1
    if order % 2 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        return order // 2 - 1
    return 0


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def two_factors(length: int, largest: int) -> tuple[Tensor, Tensor]:
    """Orthonormal float64 O (A, A) and H_B (B, B) with H_n = O ⊗ H_B, B the largest power of two up to `largest`."""
    small = small_order(length)
    power = length // small
    columns = min(power, largest)
    outer_AA = _sylvester(power // columns)
    if small > 1:
        outer_AA = torch.kron(small_factor(small), outer_AA)
    return outer_AA, _sylvester(columns)


def _sylvester(order: int) -> Tensor:
    """The orthonormal Hadamard matrix of a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / math.sqrt(order)
