"""Four-bit codes and more than 128 tokens by the kernel in Gluon, which only a GPU runs; its launches anywhere.

`compile_for_hopper.py` compiles the kernel without a GPU, where Triton checks that decoded codes lie as the operand of
tensor cores needs them. Decoding and the order of tokens are those of integers/groups_wide.py and decode.py.
"""

from __future__ import annotations

import pytest
import torch
from kernel_layers import GLUON_KINDS, GLUON_TOLERANCE, build_layer, on_hopper, random_input, relative_error

from lqer.formats import Int, MXInt
from lqer.kernels import packed_linear
from lqer.kernels.gluon.launch import fits_gluon
from lqer.kernels.gluon.tall_launch import run_tall
from lqer.kernels.layout.groups import GroupLayout
from lqer.kernels.tuning import MOST_TALL_SPLITS, TALL_ROWS, TALL_STAGES, TallLaunch, tall_launch


@on_hopper
@pytest.mark.parametrize(("number_format", "dtype"), GLUON_KINDS, ids=str)
def test_products_are_those_of_rounded_weights(number_format, dtype):
    layer = build_layer(number_format, 200, 1040, bias=True, dtype=dtype)
    for whole, splits, long in ((0, 1, 5), (1, 2, 2), (1, 2, 4), (0, 3, 1), (0, 3, 3)):
        for tokens in (1, 256, 261):
            tiles = 2 * -(-tokens // 256)
            launch = TallLaunch(256, whole if splits > 1 else tiles, splits, long, TALL_STAGES)
            x_MI = random_input(tokens, 1040, dtype)
            y_MO = run_tall(x_MI, layer.packed, launch, torch.float32)
            assert relative_error(y_MO, layer.exact(x_MI)) < GLUON_TOLERANCE[dtype], (launch, tokens)
    assert (layer.packed.workspace == 0).all()


@on_hopper
@pytest.mark.parametrize(("activation", "rank"), [(None, 0), (MXInt(8), 0), (MXInt(8), 32)], ids=str)
@pytest.mark.parametrize("number_format", [Int(4, 128), MXInt(4)], ids=str)
def test_rounded_tokens_give_the_formula(number_format, activation, rank):
    layer = build_layer(number_format, 200, 528, rank, activation, bias=True, dtype=torch.bfloat16)
    assert fits_gluon(layer.packed, random_input(1, 528, torch.bfloat16))
    for m in (17, 32, 33, 64, 65, 128, 129, 192, 256, 257, 511, 512):
        x_MI = random_input(m, 528, torch.bfloat16)
        assert relative_error(packed_linear(x_MI, layer.packed), layer.exact(x_MI)) < 2.5e-3, m


@on_hopper
def test_ten_runs_give_the_same_bits_and_every_output_is_written():
    layer = build_layer(Int(4, 128), 4000, 4096)
    for m in (17, 64, 100, 256, 300):
        x_MI = random_input(m, 4096)
        first = packed_linear(x_MI, layer.packed)
        for _ in range(9):
            # The next output takes this memory.
            poison = torch.full_like(first, float("nan"))
            del poison
            assert torch.equal(packed_linear(x_MI, layer.packed), first), m
        assert (layer.packed.workspace == 0).all()


@on_hopper
def test_tokens_that_are_not_adjacent_or_aligned_give_the_same():
    layer = build_layer(Int(4, 128), 80, 272)
    x_MI = random_input(200, 272)
    expected = packed_linear(x_MI, layer.packed)
    for before in (1, 8):
        wide = torch.cat([x_MI[:, :before], x_MI, x_MI], dim=1)
        assert torch.equal(packed_linear(wide[:, before : before + 272], layer.packed), expected)


@pytest.mark.parametrize("m", [129, 256, 300, 512])
@pytest.mark.parametrize(("rows", "strips"), [(16, 1), (4096, 16), (11008, 16), (4096, 43), (28672, 32)])
def test_a_launch_has_every_tile_and_whole_waves_of_programs(rows, strips, m):
    launch = tall_launch(GroupLayout(rows, 256 * strips, 4, 128, False, False), m, 132)
    tiles = -(-rows // TALL_ROWS) * -(-m // launch.block_m)
    assert 1 <= launch.splits <= min(strips, MOST_TALL_SPLITS)
    others = strips - launch.long
    assert others == 0 if launch.splits == 1 else launch.splits - 1 <= others <= (launch.splits - 1) * launch.long
    assert launch.whole == tiles if launch.splits == 1 else launch.whole % 132 == 0 and launch.whole < tiles


def test_one_wave_and_a_third_is_one_wave_of_whole_tiles_and_the_rest_in_thirds():
    launch = tall_launch(GroupLayout(11008, 4096, 4, 128, False, False), 512, 132)
    assert (launch.block_m, launch.whole, launch.splits) == (256, 132, 3)


def test_where_a_wave_leaves_a_third_of_the_multiprocessors_these_take_short_parts_of_its_tiles():
    launch = tall_launch(GroupLayout(11008, 4096, 4, 128, False, False), 256, 132)
    assert (launch.whole, launch.splits) == (0, 2)
    # 86 long parts leave 46 multiprocessors; each takes two short ones in the time of a long one.
    assert 2 * (16 - launch.long + 1) <= launch.long + 1
