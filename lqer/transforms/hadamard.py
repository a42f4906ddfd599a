"""Randomized orthonormal Hadamard transforms: weights become nearly normal, outliers rare (QuIP#, arXiv 2402.04396).

With H_n orthonormal and s a vector of random signs, the transform of a vector x of length n is V x = H_n (s ⊙ x). For a
linear y = W x the input is transformed by V, the output by U:

    W' = U W Vᵀ     H' = V H Vᵀ     x' = V x     y = Uᵀ (W' x')            tr(W' H' W'ᵀ) = tr(W H Wᵀ)

n = 2^p k splits into H_n = H_k ⊗ H_(2^p). The power of two is a fast transform, p steps of sums and differences; no
matrix is built. k is the smallest multiple of n's odd part for which Paley's constructions with a prime give a Hadamard
matrix:

    I    k = q + 1,  q prime, q = 3 mod 4        12, 20, 24, 60, ..
    II   k = 2 (q + 1),  q prime, q = 1 mod 4    28, 36, 76, 124, ..

Where there is none up to 256 (172 = 4 · 43), k is the odd part and H_k the orthonormal Hartley matrix, with entries
(cos + sin)(2π i j / k) / sqrt(k): as flat as a Hadamard matrix up to a factor sqrt(2).

Shapes: I in_features, O out_features, T rows of activations, K the small factor, P a power of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lqer.formats import pack_bits, unpack_bits
from lqer.statistics.symmetric import panels, symmetrize_
from lqer.transforms.base import LinearTransform, Rotation

# A small factor costs K multiplications an element; beyond this the odd part itself is cheaper or as good.
LARGEST_PALEY = 256
# A rotation gathers up to ‖x‖ in one element, which float16 may not hold; a power of two costs no digit. The value is
# that of CALDERA's kernels.
FLOAT16_HEADROOM = 32.0


@dataclass(frozen=True, eq=False)
class RandomHadamard(Rotation):
    """The transform of one linear: signs of its inputs (I,) and outputs (O,), any float dtype.

    Signs need not be ±1: fine-tuning may move them, but then only `input` and `output` still belong together.
    """

    input_signs_I: Tensor
    output_signs_O: Tensor

    def weight(self, weight_OI: Tensor) -> Tensor:
        return _randomized(_randomized(weight_OI, self.input_signs_I).T, self.output_signs_O).T.contiguous()

    def inverse_weight(self, weight_OI: Tensor) -> Tensor:
        return _inverse_randomized(
            _inverse_randomized(weight_OI, self.input_signs_I).T, self.output_signs_O
        ).T.contiguous()

    def hessian(self, hessian_II: Tensor) -> Tensor:
        rotated_II = torch.empty_like(hessian_II)
        for rows in panels(len(hessian_II)):
            rotated_II[rows] = _randomized(hessian_II[rows], self.input_signs_I)
        for columns in panels(len(hessian_II)):
            rotated_II[:, columns] = _randomized(rotated_II[:, columns].T, self.input_signs_I).T
        return symmetrize_(rotated_II)

    def input(self, x_TI: Tensor) -> Tensor:
        return _randomized(x_TI, self.input_signs_I)

    def inverse_input(self, x_TI: Tensor) -> Tensor:
        return _inverse_randomized(x_TI, self.input_signs_I)

    def output_gradient(self, g_TO: Tensor) -> Tensor:
        return _randomized(g_TO, self.output_signs_O)

    def output(self, y_TO: Tensor) -> Tensor:
        return _inverse_randomized(y_TO, self.output_signs_O)

    def to(self, dtype: torch.dtype) -> RandomHadamard:
        """The same signs in another dtype."""
        return RandomHadamard(self.input_signs_I.to(dtype), self.output_signs_O.to(dtype))

    def pack(self) -> dict[str, Tensor]:
        """Signs as a bit each, uint8, 1 for -1; as they are where fine-tuning has moved them."""
        return {"input_signs": _pack_signs(self.input_signs_I), "output_signs": _pack_signs(self.output_signs_O)}


def random_hadamard(out_features: int, in_features: int, seed: int) -> RandomHadamard:
    """Random signs from a seed, the same on every machine; on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    signs = (torch.randint(0, 2, (n,), generator=generator) for n in (in_features, out_features))
    return RandomHadamard(*(2.0 * sign - 1 for sign in signs))


def run_rotated(x: Tensor, rotation: RandomHadamard, bias_O: Tensor | None, run: Callable[[Tensor], Tensor]) -> Tensor:
    """A linear (..., in) -> (..., out) with a rotated weight: rotate x, `run` the product, rotate back, add the bias.

    In float16, x is divided by a power of two before it is rotated, and y multiplied by it afterwards.
    """
    if x.dtype == torch.float16:
        y = rotation.output(run(rotation.input(x / FLOAT16_HEADROOM))) * FLOAT16_HEADROOM
    else:
        y = rotation.output(run(rotation.input(x)))
    return y if bias_O is None else y + bias_O


def _pack_signs(signs: Tensor) -> Tensor:
    return pack_bits((signs < 0).to(torch.uint8), 1) if bool((signs.abs() == 1).all()) else signs


def _unpack_signs(packed: Tensor, length: int) -> Tensor:
    if packed.dtype != torch.uint8:
        return packed
    return 1 - 2 * unpack_bits(packed, length, 1).to(torch.float32)


def hadamard(x: Tensor) -> Tensor:
    """H_n x along the last dimension, in x's dtype; half-precision inputs are summed in float32."""
    power, small_KK = _factors(x)
    return _apply(x, power, small_KK)


def inverse_hadamard(x: Tensor) -> Tensor:
    """H_nᵀ x along the last dimension: the inverse of `hadamard`."""
    power, small_KK = _factors(x)
    return _apply(x, power, None if small_KK is None else small_KK.T)


def _randomized(x: Tensor, signs: Tensor) -> Tensor:
    return hadamard(x * signs.to(x))


def _inverse_randomized(x: Tensor, signs: Tensor) -> Tensor:
    return inverse_hadamard(x) * signs.to(x)


def _apply(x: Tensor, power: int, small_KK: Tensor | None) -> Tensor:
    y_KP = x.to(_sum_dtype(x)).reshape(*x.shape[:-1], -1, power)
    if small_KK is not None:
        y_KP = small_KK @ y_KP
    return _fast_transform(y_KP).reshape(x.shape).to(x.dtype)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _fast_transform(x_P: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of the last dimension, a power of two."""
    length, shape = x_P.shape[-1], x_P.shape
    half = 1
    while half < length:
        low, high = x_P.reshape(*shape[:-1], length // (2 * half), 2, half).unbind(-2)
        x_P = torch.stack((low + high, low - high), dim=-2)
        half *= 2
    return x_P.reshape(shape) / math.sqrt(length)


def _factors(x: Tensor) -> tuple[int, Tensor | None]:
    """The power of two, and the small orthonormal factor in the dtype x is summed in, or None if it is 1."""
    small = small_order(x.shape[-1])
    if small == 1:
        return x.shape[-1], None
    return x.shape[-1] // small, _small_factor_on(small, _sum_dtype(x), x.device)


@lru_cache
def _small_factor_on(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept on the device: a layer transforms in every call, and in a CUDA graph nothing may be copied there."""
    return small_factor(order).to(device, dtype)


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


@dataclass(frozen=True)
class Hadamard(LinearTransform):
    """`hadamard` as a configuration names it; the signs are drawn from the experiment's seed.

    Inputs of one width have the same signs in every linear, so that q, k and v read the same x'.
    """

    kind = "hadamard"

    def rotation(self, out_features: int, in_features: int, seed: int) -> RandomHadamard:
        return random_hadamard(out_features, in_features, seed)

    def unpack(self, packed: Mapping[str, Tensor], out_features: int, in_features: int) -> RandomHadamard:
        return RandomHadamard(
            _unpack_signs(packed["input_signs"], in_features), _unpack_signs(packed["output_signs"], out_features)
        )
