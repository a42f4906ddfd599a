"""LDLQ's blocks in one kernel against block by block; without a GPU in Triton's interpreter."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lqer.formats import E8P, MX, Int, MXInt, NormalFloat
from lqer.rounding import lattice_sweep
from lqer.rounding import ldlq as ldlq_module
from lqer.rounding.groups import Groups
from lqer.rounding.hessian import damp
from lqer.rounding.lattice_sweep import sweep_lattice_panel
from lqer.rounding.ldlq_panel import block_by_block, lattice_panel, panel_rounding, scalar_panel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    (E8P(2), False), (E8P(3), False), (E8P(4, "row"), False), (E8P(2, 16), False), (E8P(2, 16), True),
    (Int(3, 16), False), (Int(3, 16), True), (Int(4, "row"), False), (MXInt(4), False), (MX("mxfp4_e2m1", 16), False),
    (NormalFloat(4, 16), True),
]  # fmt: skip


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter takes as long for a program of many rows as for one of few."""
    if DEVICE == "cpu":
        monkeypatch.setattr(lattice_sweep, "ROWS", 32)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def swept_by_hand(target_PO, weight_PO, lower_PP, scale_O, bits):
    """The module's equations in PyTorch, block by block."""
    target_PO, error_PO = target_PO.clone(), torch.zeros_like(target_PO)
    number_format, codes = E8P(bits, "row"), {}
    scales = {"scales": scale_O.unsqueeze(1)}
    for k in reversed(range(0, len(target_PO), 8)):
        now = slice(k, k + 8)
        codes[k] = number_format.encode(target_PO[now].T.unsqueeze(1), scales)
        values_O8 = number_format.decode(codes[k], scales).squeeze(1)[:, : len(target_PO[now])]
        error_PO[now] = weight_PO[now] - values_O8.T
        target_PO[:k] += lower_PP[now, :k].T @ error_PO[now]
    return torch.stack([codes[k].flatten() for k in sorted(codes)]), error_PO


@pytest.mark.parametrize(("columns", "rows", "bits"), [(20, 33, 2), (16, 5, 3), (16, 5, 4)])
def test_the_kernel_walks_the_blocks_as_the_equations_say(columns, rows, bits):
    target_PO, weight_PO = normal(columns, rows), normal(columns, rows, seed=1)
    lower_PP = 0.1 * normal(columns, columns, seed=2).tril()
    scale_O = normal(rows, seed=3).abs() + 0.2
    scale_O[0] = 0
    given = (x.to(DEVICE) for x in (target_PO, weight_PO, lower_PP, scale_O))
    codes_KO, error_PO = (x.cpu() for x in sweep_lattice_panel(*given, bits))
    expected_codes_KO, expected_error_PO = swept_by_hand(target_PO, weight_PO, lower_PP, scale_O, bits)
    # Sums are added up in another order: a vector between two points may become either, and what follows differs.
    same_O = (codes_KO == expected_codes_KO).all(0)
    assert same_O.float().mean() > 0.9
    torch.testing.assert_close(error_PO[:, same_O], expected_error_PO[:, same_O], rtol=1e-4, atol=1e-4)


def rounded_panel(in_kernels, groups, block, on_gpu):
    """`panel_rounding` wherever the tensors are."""
    return panel_rounding(groups, block, in_kernels)


@pytest.mark.parametrize(("number_format", "static_groups"), CASES, ids=str)
def test_ldlq_in_kernels_is_ldlq_block_by_block(monkeypatch, number_format, static_groups):
    monkeypatch.setattr("lqer.rounding.groups.PANEL", 16)
    weight_OI, x_TI = normal(24, 40), normal(200, 40, seed=1) @ (torch.eye(40) + 0.05 * normal(40, 40, seed=2))
    weight_OI, hessian_II = weight_OI.to(DEVICE), (x_TI.T @ x_TI / 200).to(DEVICE)
    found = []
    for in_kernels in (False, True):
        monkeypatch.setattr(ldlq_module, "panel_rounding", partial(rounded_panel, in_kernels))
        found.append(ldlq_module.ldlq(weight_OI, damp(hessian_II), number_format, static_groups=static_groups))
    errors = [weight_OI - quantized.dequantize() for quantized in found]
    losses = [(error_OI @ hessian_II * error_OI).sum() for error_OI in errors]
    assert torch.ne(*(quantized.parts["codes"] for quantized in found)).float().mean() < 0.05
    torch.testing.assert_close(*losses, rtol=2e-2, atol=0)


def test_codes_of_a_launch_are_tuned_block_by_block(monkeypatch):
    weight_OI, x_TI = normal(8, 32), normal(100, 32, seed=1)
    weight_OI, hessian_II = weight_OI.to(DEVICE), (x_TI.T @ x_TI / 100).to(DEVICE)
    monkeypatch.setattr(ldlq_module, "panel_rounding", partial(rounded_panel, True))
    for number_format in (E8P(2), Int(3, 16)):
        losses = []
        for tune_iters in (0, 1):
            quantized = ldlq_module.ldlq(weight_OI, damp(hessian_II), number_format, tune_iters=tune_iters)
            error_OI = weight_OI - quantized.dequantize()
            losses.append((error_OI @ hessian_II * error_OI).sum())
        assert losses[1] < losses[0]


def test_a_gpu_has_a_kernel_for_lattice_codes_and_single_values_of_known_places():
    def way(number_format, block):
        return panel_rounding(Groups(number_format, 4, 32), block, on_gpu=True)

    assert way(E8P(2), 8) is lattice_panel
    assert way(Int(4, 16), 1) is way(MX("mxfp4_e2m1", 16), 1) is way(NormalFloat(4, 16), 1) is scalar_panel
    assert way(E8P(2), 16) is way(Int(4, 16), 2) is block_by_block
