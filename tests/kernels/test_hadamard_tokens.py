"""Rotations of several tokens at once give what the rotation of each token alone gives."""

from __future__ import annotations

import pytest
import torch
from kernel_layers import DEVICE, DTYPE, ON_GPU, random_input, random_trellis, relative_error

from lqer.formats import E8P, Int, QuantizedTensor, Trellis
from lqer.kernels import PackedLinear, hadamard_launch, packed_linear
from lqer.transforms.hadamard import random_hadamard

TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}[DTYPE]
BY_FORMAT = pytest.mark.parametrize(
    "number_format", [E8P(2), Trellis(2), Trellis(3, table="bytes")], ids=["e8p", "gaussian", "bytes"]
)


def random_layer(number_format, n: int, k: int, rank: int) -> PackedLinear:
    generator = torch.Generator().manual_seed(n + k)
    if isinstance(number_format, E8P):
        codes = torch.randint(0, 1 << 16, (n, k // 8), generator=generator).to(DEVICE)
        scales = torch.full((1, 1), 0.05, device=DEVICE)
        weight = QuantizedTensor(number_format, (n, k), 1, {"codes": codes, "scales": scales})
    else:
        weight = random_trellis(number_format, n, k)
    a, b = None, None
    if rank:
        a = Int(4, 32).quantize((torch.randn(k, rank, generator=generator) * k**-0.5).to(DEVICE), axis=0)
        b = Int(4, 32).quantize((torch.randn(rank, n, generator=generator) * 0.05).to(DEVICE), axis=0)
    bias_O = torch.randn(n, generator=generator).to(DEVICE, DTYPE)
    return PackedLinear.pack(weight, a, b, bias_O, None, DTYPE, random_hadamard(n, k, seed=1).to(DTYPE))


@pytest.fixture(autouse=True)
def from_two_tokens_on(monkeypatch):
    monkeypatch.setattr(hadamard_launch, "FEWEST_TOGETHER", 2)


@BY_FORMAT
@pytest.mark.parametrize(("n", "k", "rank"), [(128, 256, 0), (512, 512, 64), (128, 1408, 16), (192, 512, 128)])
def test_tokens_are_rotated_together_as_alone(n, k, rank, number_format):
    """Blocks of 128, 256 and 512; tiles of padding; an output whose power of two is too small for this."""
    packed = random_layer(number_format, n, k, rank)
    for m in (2, 5, 16) if ON_GPU else (3,):
        x_MI = random_input(m, k)
        together_MO = packed_linear(x_MI, packed)
        alone_MO = torch.cat([packed_linear(x_I[None], packed) for x_I in x_MI])
        assert relative_error(together_MO, alone_MO.double()) < TOLERANCE


def test_one_token_or_a_small_power_of_two_is_rotated_otherwise():
    assert hadamard_launch.together(2, 256)
    assert not hadamard_launch.together(1, 256)
    assert not hadamard_launch.together(2, 192)


@BY_FORMAT
def test_a_token_that_is_not_finite_spoils_no_other(number_format):
    packed = random_layer(number_format, 128, 256, 0)
    x_MI = random_input(3, 256)
    x_MI[1, 7] = torch.inf
    y_MO = packed_linear(x_MI, packed)
    assert torch.isfinite(y_MO[[0, 2]]).all()
