"""Matrices that are rounded at once: each as if alone. Without a GPU, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from lqer.formats import E8P, MX, Int, MXInt, NormalFloat, Trellis
from lqer.rounding import Gptq, Nearest
from lqer.rounding import gptq as gptq_module
from lqer.rounding import ldlq as ldlq_module
from lqer.rounding.ldlq import Ldlq
from lqer.rounding.ldlq_panel import panel_rounding
from lqer.rounding.stack import add_products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [
    Int(3, 32), Int(3, 32, symmetric=False), Int(4, "tensor"), MXInt(4), MX("mxfp4_e2m1"), NormalFloat(4, 64), E8P(2),
    E8P(3, 32), Trellis(2),
]  # fmt: skip
ROUNDINGS = [Nearest(), Gptq(), Gptq(static_groups=True, scales="search"), Ldlq(), Ldlq(scales="search")]


def layers(matrices=3, rows=32, columns=80):
    """Weights of sizes that differ by 100, and Hessians of which no two are alike; of one a row of zeros."""
    generator = torch.Generator().manual_seed(0)
    weights = [10.0**e * torch.randn(rows, columns, generator=generator) for e in range(matrices)]
    mixed = (torch.randn(columns, columns, generator=generator) for _ in range(matrices))
    inputs = [torch.randn(200, columns, generator=generator) @ mixed_II for mixed_II in mixed]
    inputs[0][:, 5] = 0
    found = [{"hessian": x_TI.T @ x_TI / 200, "mean_square": x_TI.square().mean(0)} for x_TI in inputs]
    return [x.to(DEVICE) for x in weights], [{kind: x.to(DEVICE) for kind, x in one.items()} for one in found]


def check_alike(found, expected, weights, statistics):
    """The sums differ in the last bit, so that a weight halfway between two codes may become either."""
    for one, other, weight_OI, of_one in zip(found, expected, weights, statistics, strict=True):
        assert one.shape == other.shape
        assert {name: part.shape for name, part in one.parts.items()} == {
            name: part.shape for name, part in other.parts.items()
        }
        assert (one.parts["codes"] != other.parts["codes"]).float().mean() < 0.02
        losses = [
            (error_OI @ of_one["hessian"] * error_OI).sum()
            for error_OI in (weight_OI - quantized.dequantize() for quantized in (one, other))
        ]
        torch.testing.assert_close(*losses, rtol=2e-2, atol=0)


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_weights_are_rounded_together_as_each_alone(rounding, number_format):
    if rounding.unsupported_reason(number_format) is not None:
        pytest.skip("the rounding refuses the format")
    weights, statistics = layers()
    found = rounding.round_together(weights, statistics, number_format)
    expected = [rounding.round(*given, number_format) for given in zip(weights, statistics, strict=True)]
    check_alike(found, expected, weights, statistics)


@pytest.mark.parametrize("rounding", [Gptq(descent=1), Gptq(activation_order=True), Ldlq(tune_iters=1)], ids=str)
def test_what_cannot_be_done_at_once_is_done_for_each(rounding):
    weights, statistics = layers()
    found = rounding.round_together(weights, statistics, Int(3, 32))
    for one, *given in zip(found, weights, statistics, strict=True):
        expected = rounding.round(*given, Int(3, 32))
        assert all(torch.equal(part, expected.parts[name]) for name, part in one.parts.items())


@pytest.mark.parametrize("number_format", [Int(3, 16), MXInt(4), NormalFloat(4, 16), E8P(2, 16)], ids=str)
def test_kernels_walk_the_columns_of_all_matrices(monkeypatch, number_format):
    is_lattice = isinstance(number_format, E8P)
    # Rows that do not fill a program of the kernel.
    weights, statistics = layers(matrices=2, rows=12 if is_lattice else 40, columns=32)
    for rounding in (Ldlq(),) if is_lattice else (Gptq(), Ldlq()):
        with monkeypatch.context() as patched:
            patched.setattr("lqer.rounding.groups.PANEL", 16)
            patched.setattr(gptq_module, "_panel_column_by_column", gptq_module._panel_in_one_kernel)
            patched.setattr(
                ldlq_module, "panel_rounding", lambda groups, block, on_gpu: panel_rounding(groups, block, True)
            )
            found = rounding.round_together(weights, statistics, number_format)
        expected = [rounding.round(*given, number_format) for given in zip(weights, statistics, strict=True)]
        check_alike(found, expected, weights, statistics)


@pytest.mark.parametrize("matrices", [1, 3])
def test_products_of_every_matrix_are_added_to_its_own_columns(matrices):
    y_JEO, a_EPJ, x_PEO = torch.randn(7, matrices, 5), torch.randn(matrices, 4, 7), torch.randn(4, matrices, 5)
    expected = y_JEO - 2 * torch.einsum("epj,peo->jeo", a_EPJ, x_PEO)
    # The middle of a longer sweep.
    whole = torch.cat([y_JEO, y_JEO])
    add_products(whole[:7], a_EPJ, x_PEO, alpha=-2)
    torch.testing.assert_close(whole, torch.cat([expected, y_JEO]))
