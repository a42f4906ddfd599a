"""Randomized orthonormal Hadamard transforms: weights become nearly normal, outliers rare (QuIP#, arXiv 2402.04396).

With H_n orthonormal and s a vector of random signs, the transform of a vector x of length n is V x = H_n (s ⊙ x). For a
linear y = W x the input is transformed by V, the output by U:

    W' = U W Vᵀ     H' = V H Vᵀ     x' = V x     y = Uᵀ (W' x')            tr(W' H' W'ᵀ) = tr(W H Wᵀ)

n = 2^p k splits into H_n = H_k ⊗ H_(2^p) with a small k (hadamard_factors.py). On a CPU the power of two is a fast
transform, p steps of sums and differences, and no matrix is built. On a GPU the transform is two products, H_n = O ⊗
H_B; of half-precision inputs without gradients, a kernel does both (hadamard_kernel.py).

Shapes: I in_features, O out_features, T rows of activations, K the small factor, P a power of two, A the outer and B
the inner factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from lqer.formats import pack_bits, unpack_bits
from lqer.formats.agreement import agrees
from lqer.statistics.symmetric import panels, symmetrize_
from lqer.transforms.base import LinearTransform, Rotation
from lqer.transforms.hadamard_factors import small_factor, small_order, two_factors

# A rotation gathers up to ‖x‖ in one element, which float16 may not hold; a power of two costs no digit. The value is
# that of CALDERA's kernels.
FLOAT16_HEADROOM = 32.0
# On a GPU, columns of the inner factor: a product with it costs as many operations a value.
LARGEST_INNER = 128


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

    def on(self, device: torch.device) -> RandomHadamard:
        return RandomHadamard(self.input_signs_I.to(device), self.output_signs_O.to(device))

    def pack(self) -> dict[str, Tensor]:
        """Signs as a bit each, uint8, 1 for -1; as they are where fine-tuning has moved them. On the CPU."""
        # Files hold no tensor twice, and linears share a rotation.
        return {name: packed.clone() for name, packed in self._packed.items()}

    @cached_property
    def _packed(self) -> dict[str, Tensor]:
        signs = {"input_signs": self.input_signs_I, "output_signs": self.output_signs_O}
        return {name: _pack_signs(of_one.cpu()) for name, of_one in signs.items()}


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
    return _apply(x, inverse=False)


def inverse_hadamard(x: Tensor) -> Tensor:
    """H_nᵀ x along the last dimension: the inverse of `hadamard`."""
    return _apply(x, inverse=True)


def _randomized(x: Tensor, signs: Tensor) -> Tensor:
    if _in_one_kernel(x, signs):
        return _by_kernel(x, signs, inverse=False)
    return hadamard(x * signs.to(x))


def _inverse_randomized(x: Tensor, signs: Tensor) -> Tensor:
    if _in_one_kernel(x, signs):
        return _by_kernel(x, signs, inverse=True)
    return inverse_hadamard(x) * signs.to(x)


def _apply(x: Tensor, inverse: bool) -> Tensor:
    wide = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
    transform = _by_products if x.is_cuda else _by_sums
    return transform(wide, inverse).reshape(x.shape).to(x.dtype)


def _by_sums(x: Tensor, inverse: bool) -> Tensor:
    """P steps of sums and differences of a power of two, after a product with the small factor."""
    small = small_order(x.shape[-1])
    y_KP = x.unflatten(-1, (small, -1))
    if small > 1:
        small_KK = _small_factor_on(small, x.dtype, x.device)
        y_KP = (small_KK.T if inverse else small_KK) @ y_KP
    return _fast_transform(y_KP)


def _by_products(x: Tensor, inverse: bool) -> Tensor:
    """Two products with matrices of about a hundred rows: a GPU would spend the steps of sums on moving memory."""
    outer_AA, inner_BB = _factors_on(x.shape[-1], inverse, x.dtype, x.device)
    with torch.autocast(x.device.type, enabled=False):
        y_AB = x.unflatten(-1, (len(outer_AA), -1)) @ inner_BB
        return y_AB if len(outer_AA) == 1 else outer_AA @ y_AB


def _in_one_kernel(x: Tensor, signs: Tensor) -> bool:
    """Whether one kernel transforms x: it knows half precision on a GPU, and no gradients."""
    learns = torch.is_grad_enabled() and (x.requires_grad or signs.requires_grad)
    if not x.is_cuda or learns or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    from lqer.transforms.hadamard_kernel import fits

    return fits(x.shape[-1]) and _kernel_agrees(x.shape[-1], x.dtype, x.device)


def _kernel_agrees(length: int, dtype: torch.dtype, device: torch.device) -> bool:
    from lqer.transforms.hadamard_kernel import FEW_TOKENS

    def inputs() -> tuple[Tensor, Tensor]:
        signs_I = 1.0 - 2.0 * (torch.arange(length) % 3 == 0)
        # More tokens than those that a program takes one of.
        x_TI = torch.randn(FEW_TOKENS + 3, length, generator=torch.Generator().manual_seed(0))
        return x_TI.to(device, dtype), signs_I.to(device, dtype)

    def by_kernel() -> Tensor:
        x_TI, signs_I = inputs()
        return torch.cat([_by_kernel(x, signs_I, inverse) for x in (x_TI, x_TI[:3]) for inverse in (False, True)])

    def by_torch() -> Tensor:
        x_TI, signs_I = inputs()
        both = [(hadamard(x * signs_I), inverse_hadamard(x) * signs_I) for x in (x_TI, x_TI[:3])]
        return torch.cat([y for pair in both for y in pair])

    return agrees(("Hadamard transforms", length, dtype, device), by_kernel, by_torch, 2 * torch.finfo(dtype).eps)


def _by_kernel(x: Tensor, signs: Tensor, inverse: bool) -> Tensor:
    from lqer.transforms.hadamard_kernel import factors_on, transform

    factors = factors_on(x.shape[-1], inverse, x.dtype, x.device)
    return transform(x, signs.to(x.device), factors, signs_first=not inverse)


def _fast_transform(x_P: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of the last dimension, a power of two."""
    length, shape = x_P.shape[-1], x_P.shape
    half = 1
    while half < length:
        low, high = x_P.reshape(*shape[:-1], length // (2 * half), 2, half).unbind(-2)
        x_P = torch.stack((low + high, low - high), dim=-2)
        half *= 2
    return x_P.reshape(shape) / math.sqrt(length)


# Both are kept on the device: a layer transforms in every call, and in a CUDA graph nothing may be copied there. They
# may be made in inference mode, and used where gradients are.
@lru_cache
@torch.inference_mode(False)
def _small_factor_on(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return small_factor(order).to(device, dtype)


@lru_cache
@torch.inference_mode(False)
def _factors_on(length: int, inverse: bool, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    outer_AA, inner_BB = two_factors(length, LARGEST_INNER)
    return (outer_AA.T if inverse else outer_AA).to(device, dtype), inner_BB.to(device, dtype)


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
