"""Rounding under learnt ranges in kernels against PyTorch; without a GPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from lqer.formats import Int
from lqer.transforms import lwc_kernel
from lqer.transforms.learnt_ranges import rounded_under
from lqer.transforms.lwc_kernel import FusedRounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# 72 is no multiple of 16: the last group is ragged.
ROWS, COLUMNS = 5, 72
FORMATS = [Int(bits=2, block_size=16), Int(bits=4, block_size="row"), Int(bits=3, block_size=16, symmetric=True)]


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
@pytest.mark.parametrize("tile", [32, 2048])
def test_values_and_gradients_are_those_in_pytorch(monkeypatch, number_format, tile):
    """Rows that one program walks in several turns, and several groups of one program."""
    monkeypatch.setattr(lwc_kernel, "TILE", tile)
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(ROWS, COLUMNS, generator=generator).to(DEVICE)
    upstream_OI = torch.randn(ROWS, COLUMNS, generator=generator).to(DEVICE)
    groups = ROWS, 1 if number_format.block_size == "row" else 5
    # Narrow enough for some weights to lie beyond the codes.
    step_ON = torch.rand(groups, generator=generator).add(0.2).to(DEVICE)
    zero_ON = torch.zeros(groups) if number_format.symmetric else torch.randint(0, 3, groups, generator=generator)
    found = []
    for way in (rounded_under, lambda *given: FusedRounding.apply(*given, torch.float32)):
        step, zero = step_ON.clone().requires_grad_(), zero_ON.float().to(DEVICE).requires_grad_()
        rounded_OI = way(weight_OI, step, zero, number_format)
        rounded_OI.backward(upstream_OI)
        found.append((rounded_OI.detach(), step.grad, zero.grad))
    assert torch.equal(found[0][0], found[1][0])
    for expected, kernel in zip(*found, strict=True):
        torch.testing.assert_close(kernel, expected, rtol=1e-4, atol=1e-5)


def test_it_is_rounded_to_a_narrower_dtype_once():
    weight_OI = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    step_ON, zero_ON = torch.full((4, 2), 0.3, device=DEVICE), torch.ones(4, 2, device=DEVICE)
    given = weight_OI, step_ON, zero_ON, Int(bits=3, block_size=32)
    assert torch.equal(FusedRounding.apply(*given, torch.float16), rounded_under(*given).to(torch.float16))
