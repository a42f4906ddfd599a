"""Norms and gates before packed linears and residuals after them, in the launches of their kernels and by torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_layers import DEVICE, DTYPE, ON_GPU, build_layer, random_lattice, random_trellis, relative_error

from lqer.formats import Codebook, Int, MXInt, Trellis
from lqer.kernels import PackedLinear
from lqer.kernels.fusion import Fused, Norm
from lqer.kernels.launch import adds_residual, makes_inputs, run_layer
from lqer.kernels.linear import OPERATOR
from lqer.kernels.reference import reference_linear
from lqer.transforms.hadamard import random_hadamard

CODES = {
    "E8P": random_lattice,
    "trellis, computed": lambda n, k: random_trellis(Trellis(2, table="bytes"), n, k),
    "trellis, looked up": lambda n, k: random_trellis(Trellis(2), n, k),
}


def rotated(codes: str, n: int, k: int, rank: int = 0) -> PackedLinear:
    factors = build_layer(MXInt(4), n, k, rank, bias=True)
    rotation = random_hadamard(n, k, seed=2)
    return PackedLinear.pack(CODES[codes](n, k), factors.a, factors.b, factors.bias_O, None, DTYPE, rotation)


def random_fused(m: int, n: int, k: int, offset: float = 0.0) -> tuple[torch.Tensor, Fused]:
    """Tokens of unequal size, a norm with weights that differ, and a residual."""
    generator = torch.Generator().manual_seed(m + n + k)
    h_MI = torch.randn(m, k, generator=generator) * torch.logspace(-2, 2, m)[:, None]
    weight_I = torch.rand(k, generator=generator) + 0.5 - offset
    residual_MO = torch.randn(m, n, generator=generator)
    norm = Norm(weight_I.to(DEVICE, DTYPE), 1e-5, offset)
    return h_MI.to(DEVICE, DTYPE), Fused(norm, residual_MO.to(DEVICE, DTYPE))


def expected(h_MI: torch.Tensor, packed: PackedLinear, fused: Fused) -> torch.Tensor:
    y_MO = reference_linear(fused.before(h_MI), replace(packed))
    return y_MO if fused.residual_MO is None else fused.residual_MO.double() + y_MO.double()


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize(("n", "k", "rank"), [(64, 256, 0), (96, 1536, 16), *[(4096, 5120, 64)] * ON_GPU])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rotated_linears_norm_tokens_and_add_residuals_in_their_launches(codes, n, k, rank, offset):
    packed = rotated(codes, n, k, rank)
    for m in (1, 3, 5, 17) if ON_GPU else (1, 5):
        assert makes_inputs(packed.spec, True, m)
        h_MI, fused = random_fused(m, n, k, offset)
        # Tokens are rounded to the dtype before and after the norm by torch, and not by kernels.
        assert relative_error(run_layer(h_MI, packed, fused), expected(h_MI, packed, fused)) < (
            8e-3 if torch.bfloat16 == DTYPE else 1e-3
        )


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize(("n", "k", "rank"), [(64, 256, 0), (96, 688, 16), *[(4096, 11008, 64)] * ON_GPU])
def test_rotated_linears_gate_tokens_in_their_launches(codes, n, k, rank):
    """Of a tensor that holds both parts side by side, as linears of one input leave them."""
    packed = rotated(codes, n, k, rank)
    for m in (1, 3, 5, 17) if ON_GPU else (1, 5):
        both_MI, fused = random_fused(m, n, 2 * k)
        gate_MI, up_MI = 0.1 * both_MI[:, :k], both_MI[:, k:]
        fused = Fused(residual_MO=fused.residual_MO, up_MI=up_MI)
        assert relative_error(run_layer(gate_MI, packed, fused), expected(gate_MI, packed, fused)) < (
            8e-3 if torch.bfloat16 == DTYPE else 1e-3
        )


def test_each_part_of_many_tokens_has_its_own_residual():
    packed = rotated("trellis, looked up", 64, 256)
    h_MI, fused = random_fused(20, 64, 256)
    assert relative_error(run_layer(h_MI, packed, fused), expected(h_MI, packed, fused)) < 8e-3
    fused = Fused(residual_MO=fused.residual_MO, up_MI=h_MI.flip(0))
    assert relative_error(run_layer(h_MI, packed, fused), expected(h_MI, packed, fused)) < 8e-3


@pytest.mark.parametrize(
    ("number_format", "rank", "activation"),
    [(Int(4, 32), 0, None), (Int(3, 64), 16, MXInt(8)), (MXInt(4), 0, None), (MXInt(4), 32, MXInt(8))],
    ids=str,
)
@pytest.mark.parametrize("m", [1, 9, 20])
def test_integers_add_residuals_in_their_launches_and_torch_norms_their_tokens(number_format, rank, activation, m):
    packed = build_layer(number_format, 80, 320, rank, activation, bias=True).packed
    assert adds_residual(packed.spec, False, m)
    assert not makes_inputs(packed.spec, False, m)
    h_MI, fused = random_fused(m, 80, 320)
    alone_MO = run_layer(fused.before(h_MI), packed)
    assert relative_error(run_layer(h_MI, packed, fused), fused.after(alone_MO.double())) < (
        4e-3 if torch.bfloat16 == DTYPE else 1e-3
    )


@pytest.mark.parametrize("number_format", [MXInt(4), Codebook(2, 2, 2048)], ids=str)
def test_torch_computes_what_other_linears_cannot_fuse(number_format):
    packed = build_layer(number_format, 64, 512).packed
    h_MI, fused = random_fused(300, 64, 512)
    assert not adds_residual(packed.spec, False, 300)
    assert torch.equal(run_layer(h_MI, packed, fused), fused.after(run_layer(fused.before(h_MI), packed)))


def test_the_operator_takes_any_leading_dimensions_and_leaves_the_residual():
    packed = rotated("trellis, computed", 64, 256)
    h_MI, fused = random_fused(6, 64, 256)
    residual = fused.residual_MO.view(2, 3, 64)
    before = residual.clone()
    y = OPERATOR(
        h_MI.view(2, 3, 256), *packed.weight.parts, packed.bias_O, None, None, None, None, packed.workspace,
        packed.input_signs_I, packed.output_signs_O, packed.spec.text, fused.norm.weight_I, fused.norm.eps,
        fused.norm.offset, residual,
    )  # fmt: skip
    assert y.shape == residual.shape
    assert torch.equal(y.view(6, 64), run_layer(h_MI, packed, fused))
    assert torch.equal(residual, before)


def test_rounded_tokens_and_many_of_them_are_normed_by_torch():
    packed = rotated("E8P", 64, 256)
    assert not makes_inputs(packed.spec, True, 65)
    assert not makes_inputs(packed.spec, False, 1)
    assert not adds_residual(packed.spec, True, 65)
    h_MI, fused = random_fused(65, 64, 256)
    assert relative_error(run_layer(h_MI, packed, fused), expected(h_MI, packed, fused)) < 8e-3
