"""The soft weight and its gradient in kernels against PyTorch; without a GPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from lqer.formats import Int, MXInt
from lqer.rounding import soft_kernel
from lqer.rounding.soft import Grid, _SoftWeight
from lqer.rounding.soft_kernel import FusedSoftWeight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# 72 is no multiple of 16: the last group is ragged.
ROWS, COLUMNS = 5, 72
FORMATS = [
    Int(bits=2, block_size=16), Int(bits=4, block_size="row"), Int(bits=3, block_size=16, symmetric=True),
    MXInt(bits=4, block_size=16), MXInt(bits=3, block_size=16, levels="mid-rise"),
]  # fmt: skip


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
@pytest.mark.parametrize("tile", [32, 2048])
def test_value_and_gradients_are_those_in_pytorch(monkeypatch, number_format, tile):
    """Rows that one program walks in several turns, and several groups of one program."""
    monkeypatch.setattr(soft_kernel, "TILE", tile)
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(ROWS, COLUMNS, generator=generator)
    weight_OI[2, 16:32] = 0
    start = number_format.quantize(weight_OI.to(DEVICE))
    # Half of the weights are beyond the codes.
    grid = Grid.of(2 * weight_OI.to(DEVICE), start)
    v_OI = 3 * torch.randn(ROWS, COLUMNS, generator=generator)
    v_OI[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.inf, -torch.inf])
    upstream_OI = torch.randn(ROWS, COLUMNS, generator=generator).to(DEVICE)
    found = []
    for apply in (_SoftWeight.apply, lambda v, step, grid: FusedSoftWeight.apply(v, step, grid, torch.float32)):
        v, step = v_OI.to(DEVICE).requires_grad_(), grid.spacing.step_G.clone().requires_grad_()
        soft_OI = apply(v, step, grid)
        soft_OI.backward(upstream_OI)
        found.append((soft_OI.detach(), v.grad, step.grad))
    for expected, kernel in zip(*found, strict=True):
        torch.testing.assert_close(kernel, expected, rtol=1e-4, atol=1e-5)


def test_it_is_rounded_to_a_narrower_dtype_once():
    weight_OI = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    grid = Grid.of(weight_OI, Int(bits=3, block_size=32).quantize(weight_OI))
    v_OI, step_ON = grid.start_v_OI.requires_grad_(), grid.spacing.step_G
    wide_OI = FusedSoftWeight.apply(v_OI, step_ON, grid, torch.float32)
    narrow_OI = FusedSoftWeight.apply(v_OI, step_ON, grid, torch.float16)
    assert torch.equal(narrow_OI, wide_OI.to(torch.float16))
    narrow_OI.sum().backward()
    assert v_OI.grad.dtype == torch.float32
