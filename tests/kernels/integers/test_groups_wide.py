"""Four-bit groups as operands of wgmma: the PTX that decodes them, emulated, and the kernel against the formula.

Weights are rounded to the layer's dtype, as emulation rounds them.
"""

from __future__ import annotations

import pytest
import torch
from kernel_layers import DTYPE, DTYPES, ON_GPU, build_layer, random_input, relative_error
from ptx import Machine

from lqer.formats import Int, MXInt
from lqer.kernels import packed_linear
from lqer.kernels.integers.groups_wide import spread_asm, word_asm
from lqer.kernels.integers.launch import run_wide
from lqer.kernels.launch import WIDE_FROM, WIDE_TOKENS
from lqer.kernels.layout.groups import GroupLayout
from lqer.kernels.tuning import GemmLaunch, wide_launch

FORMATS = [Int(4, 32), Int(4, 128), Int(4, 64, symmetric=True, scale_dtype="bfloat16"), Int(4, 256), Int(4, "row")]
SMALL = GemmLaunch(block_n=64, block_m=32, splits=2, stages=2, warps=4)
LAUNCHES = [SMALL, GemmLaunch(128, 64, 3, 2, 4), GemmLaunch(128, 128, 1, 2, 8)]
TOKENS = range(WIDE_FROM, WIDE_TOKENS + 1) if ON_GPU else (17, 33)
# Of weights that are rounded to bfloat16 through two scales: next to ties they are rounded the other way.
TOLERANCE = {torch.bfloat16: 1e-4, torch.float16: 2e-6}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_instructions_round_every_product_once(dtype, scale_dtype, symmetric):
    layout = GroupLayout(64, 256, 4, 128, symmetric, scale_dtype == torch.bfloat16)
    scales = (torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 0.05).to(scale_dtype)
    bits, zero = scales.view(torch.int16).to(torch.int64) & 0xFFFF, torch.arange(1000) % 16
    found = Machine().run(spread_asm(layout, dtype == torch.bfloat16), {"$3": bits, "$4": zero})
    for first in (0, 8):
        codes = torch.arange(first, first + 8)
        # Even codes lie in the low half of a word, odd ones in the high half.
        word = sum(int(code) << (4 * (n // 2) + 16 * (n % 2)) for n, code in enumerate(codes))
        operands = {"$8": torch.full((1000,), word), "$9": found["$0"], "$10": found["$1"], "$11": found["$2"]}
        registers = Machine().run(word_asm(layout, dtype == torch.bfloat16), operands)
        for n, code in enumerate(codes):
            values = registers[f"${n}"].to(torch.int16).view(dtype)
            exact = (int(code) - zero).double() * scales.double()
            expected = exact.to(dtype)
            if dtype == scale_dtype:
                assert torch.equal(values, expected)
            else:
                close = torch.finfo(dtype).eps * (0.5 + 2**-6)
                assert ((values.double() - exact).abs() <= close * exact.abs() + torch.finfo(dtype).tiny).all()
                assert (values == expected).float().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_products_are_those_of_rounded_weights(number_format, dtype):
    layer = build_layer(number_format, 200, 528, bias=True, dtype=dtype)
    for launch in LAUNCHES if ON_GPU else LAUNCHES[:2]:
        x_MI = random_input(launch.block_m + 5, 528, dtype)
        y_MO = run_wide(x_MI, layer.packed, launch, torch.float32)
        assert relative_error(y_MO, layer.exact(x_MI)) < TOLERANCE[dtype], launch


@pytest.mark.parametrize(("rank", "activation"), [(0, MXInt(8)), (32, MXInt(8)), (100, None)], ids=str)
def test_branches_and_rounded_tokens_give_the_formula(rank, activation):
    layer = build_layer(Int(4, 128), 200, 528, rank=rank, activation=activation, bias=True)
    for m in TOKENS:
        x_MI = random_input(m, 528)
        error = relative_error(packed_linear(x_MI, layer.packed), layer.exact(x_MI))
        assert error < (2.5e-3 if torch.bfloat16 == DTYPE else 4e-4), m
    assert (layer.packed.workspace == 0).all()


def test_tokens_that_are_not_adjacent_or_aligned_give_the_same():
    layer = build_layer(Int(4, 128), 80, 272)
    x_MI = random_input(20, 272)
    expected = packed_linear(x_MI, layer.packed)
    for before in (1, 8):
        wide = torch.cat([x_MI[:, :before], x_MI, x_MI], dim=1)
        assert torch.equal(packed_linear(wide[:, before : before + 272], layer.packed), expected)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter runs programs one after the other")
def test_ten_runs_give_the_same_bits():
    layer = build_layer(Int(4, 128), 4096, 2048)
    for m in (17, 64, 100):
        x_MI = random_input(m, 2048)
        first = packed_linear(x_MI, layer.packed)
        assert all(torch.equal(packed_linear(x_MI, layer.packed), first) for _ in range(9))
        assert (layer.packed.workspace == 0).all()


def test_a_launch_has_all_tokens_and_a_split_for_no_more_than_each_strip():
    for rows, strips in ((16, 1), (4096, 16), (11008, 16), (4096, 43), (28672, 32)):
        layout = GroupLayout(rows, 256 * strips, 4, 128, False, False)
        for m in (WIDE_FROM, 32, 33, 64, 65, WIDE_TOKENS):
            launch = wide_launch(layout, m, 132)
            assert 1 <= launch.splits <= strips
            assert launch.block_m >= min(m, 64)


@pytest.mark.parametrize(("rows", "strips", "splits"), [(11008, 16, 3), (8192, 32, 4)])
def test_programs_of_the_shapes_that_were_timed_run_at_once(rows, strips, splits):
    layout = GroupLayout(rows, 256 * strips, 4, 128, False, False)
    assert [wide_launch(layout, m, 132).splits for m in (32, 64)] == [splits, splits]
