"""Transforms in one kernel against those in PyTorch; without a GPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from lqer.formats import agreement
from lqer.transforms import hadamard_kernel
from lqer.transforms.hadamard import _kernel_agrees, hadamard, inverse_hadamard, random_hadamard
from lqer.transforms.hadamard_factors import small_order
from lqer.transforms.hadamard_kernel import factors_on, fits, transform

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Powers of two, of Paley's and of Hartley's matrices; few rows or columns, padded ones, and as many as there may be.
LENGTHS = [16, 4096, 1536, 960, 4864, 5120, 11008, 14336]


def tokens(rows: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(rows, length, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 50  # an outlier, as activations have them
    return x.to(DEVICE, dtype)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inverse", [False, True])
def test_it_is_the_transform_in_float32(length, dtype, inverse):
    x, signs = tokens(3, length, dtype), random_hadamard(length, length, 0).input_signs_I.to(DEVICE, dtype)
    y = transform(x, signs, factors_on(length, inverse, dtype, DEVICE), signs_first=not inverse)
    wide = x.float()
    expected = inverse_hadamard(wide) * signs.float() if inverse else hadamard(wide * signs.float())
    assert y.dtype == dtype
    # A rounding to the dtype, of values that differ in their last bits of float32.
    step = torch.finfo(dtype).eps * expected.abs() + 2e-5 * expected.abs().max()
    assert ((y.float() - expected).abs() <= step).all()


def test_a_program_of_several_tokens_transforms_each_as_alone(monkeypatch):
    monkeypatch.setattr(hadamard_kernel, "FEW_TOKENS", 2)
    x = tokens(11, 128, torch.float16)[:, :64]
    signs = random_hadamard(64, 64, 0).input_signs_I.to(DEVICE)
    factors = factors_on(64, False, torch.float16, DEVICE)
    together = transform(x, signs, factors, signs_first=True)
    alone = torch.cat([transform(row[None].contiguous(), signs, factors, signs_first=True) for row in x])
    assert torch.equal(together, alone)


def test_it_is_used_where_it_agrees_with_pytorch_and_not_where_it_is_broken(monkeypatch):
    monkeypatch.setattr(agreement, "_agreed", {})
    monkeypatch.setattr(hadamard_kernel, "FEW_TOKENS", 2)
    assert _kernel_agrees(64, torch.float16, DEVICE)
    agreement._agreed.clear()
    monkeypatch.setattr(hadamard_kernel, "transform", lambda x, *_, signs_first: x.flip(-1))
    assert not _kernel_agrees(64, torch.float16, DEVICE)


def test_only_lengths_that_a_program_holds():
    assert [length for length in (8, 16, 4096, 14336, 16384, 28672, 53248) if fits(length)] == [16, 4096, 14336, 16384]
    assert small_order(8) == 1


def test_lengths_that_a_compiler_breaks_are_refused():
    assert [length for length in (688, 1376, 5504, 11008) if fits(length)] == [11008]
