"""Coordinate descent on lattice codes in a kernel against block by block; without a GPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from lqer.formats import E8P, Int
from lqer.rounding import lattice_sweep, ldlq_tuning
from lqer.rounding import ldlq as ldlq_module
from lqer.rounding.groups import Groups
from lqer.rounding.hessian import DampedHessian
from lqer.rounding.ldlq_tuning import block_shares, has_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter takes as long for a program of many rows as for one of few."""
    if DEVICE == "cpu":
        monkeypatch.setattr(lattice_sweep, "ROWS", 32)


def layer(rows, columns):
    normal = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(rows, columns, generator=normal)
    mixing_II = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=normal)
    x_TI = torch.randn(300, columns, generator=normal) @ mixing_II
    return weight_OI.to(DEVICE), DampedHessian((x_TI.T @ x_TI / 300).to(DEVICE))


def losses(weight_OI, damped, quantized):
    """Of the rows, under the damped Hessian, which is what a sweep lowers."""
    error_OI = weight_OI - quantized.dequantize()
    return (error_OI @ damped.matrix(torch.float32) * error_OI).sum(1)


@pytest.mark.parametrize("number_format", [E8P(2), E8P(3), E8P(4, "row"), E8P(2, 16)], ids=str)
def test_sweeps_in_kernels_are_sweeps_block_by_block(monkeypatch, number_format):
    monkeypatch.setattr("lqer.rounding.groups.PANEL", 16)
    weight_OI, damped = layer(24, 48 if number_format.block_size == 16 else 44)
    found = []
    for in_kernels in (False, True):
        monkeypatch.setattr(ldlq_tuning, "has_kernel", lambda groups, block, on_gpu, found=in_kernels: found)
        quantized = [ldlq_module.ldlq(weight_OI, damped, number_format, tune_iters=sweeps) for sweeps in (1, 3)]
        found.append([losses(weight_OI, damped, one) for one in quantized])
    # A vector between two points may become either, and what follows in its row differs.
    for by_blocks_O, in_kernels_O in zip(*found, strict=True):
        same_O = torch.isclose(by_blocks_O, in_kernels_O, rtol=1e-4)
        assert same_O.float().mean() > 0.85
        torch.testing.assert_close(by_blocks_O.sum(), in_kernels_O.sum(), rtol=2e-2, atol=0)
    after_1_O, after_3_O = found[1]
    assert (after_3_O <= after_1_O * (1 + 1e-5)).all()
    assert after_3_O.sum() < after_1_O.sum()


def test_errors_and_codes_of_a_sweep_agree(monkeypatch):
    weight_OI, damped = layer(24, 40)
    number_format = E8P(2)
    rounded = ldlq_module.ldlq(weight_OI, damped, number_format)
    groups = Groups(number_format, 24, 40)
    groups.fit_all(weight_OI)
    codes = {0: rounded.parts["codes"].view(24, -1)}
    error_IO = (weight_OI - rounded.dequantize()).T.contiguous()
    monkeypatch.setattr(ldlq_tuning, "has_kernel", lambda *_: True)
    found = ldlq_tuning.tuned(weight_OI.T.contiguous(), error_IO, codes, damped.matrix(torch.float32), groups, 8, 2)
    codes_OV = torch.cat([found[k] for k in sorted(found)], dim=1)
    assert (codes_OV != rounded.parts["codes"].view(24, -1)).any()
    values_OI = groups.finish(codes_OV)[0].dequantize()
    torch.testing.assert_close(weight_OI - values_OI, error_IO.T, rtol=0, atol=1e-5)


def test_shares_are_the_rows_of_each_block_over_its_own_square():
    hessian_II = layer(8, 20)[1].matrix(torch.float32)
    shares_II = block_shares(hessian_II, 8)
    for now in (slice(0, 8), slice(8, 16), slice(16, 20)):
        torch.testing.assert_close(hessian_II[now, now] @ shares_II[now], hessian_II[now], rtol=1e-4, atol=1e-4)


def test_a_gpu_has_a_kernel_for_lattice_codes_in_blocks_of_a_vector():
    assert has_kernel(Groups(E8P(2), 4, 32), 8, on_gpu=True)
    assert not has_kernel(Groups(E8P(2), 4, 32), 16, on_gpu=True)
    assert not has_kernel(Groups(Int(4, 16), 4, 32), 8, on_gpu=True)
    assert not has_kernel(Groups(E8P(2), 4, 32), 8, on_gpu=False)
