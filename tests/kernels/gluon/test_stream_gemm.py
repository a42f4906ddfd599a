"""Four-bit codes and 33 to 128 tokens by the kernel whose warps have roles, which a GPU runs; its launches anywhere.

`compile_for_hopper.py` compiles it without a GPU, where Triton checks that decoded codes lie as the operand of tensor
cores needs them. Decoding and the order of tokens are those of integers/groups_wide.py and decode.py.
"""

from __future__ import annotations

import pytest
import torch
from kernel_layers import GLUON_KINDS, GLUON_TOLERANCE, build_layer, on_hopper, random_input, relative_error

from lqer.formats import Int
from lqer.kernels.gluon.stream_launch import run_stream
from lqer.kernels.layout.groups import GroupLayout
from lqer.kernels.tuning import STREAM, STREAM_ROWS, StreamLaunch, stream_launch


@on_hopper
@pytest.mark.parametrize(("number_format", "dtype"), GLUON_KINDS, ids=str)
def test_products_are_those_of_rounded_weights(number_format, dtype):
    layer = build_layer(number_format, 200, 1040, bias=True, dtype=dtype)
    # Whole tiles, parts of tiles within and beyond a program, a turn each.
    for block_m, programs in ((64, 2), (64, 3), (64, 7), (128, 1), (128, 264)):
        for tokens in (1, block_m, block_m + 5):
            x_MI = random_input(tokens, 1040, dtype)
            launch = StreamLaunch(block_m, programs, 3, STREAM[block_m])
            y_MO = run_stream(x_MI, layer.packed, launch, torch.float32)
            assert relative_error(y_MO, layer.exact(x_MI)) < GLUON_TOLERANCE[dtype], (launch, tokens)
    assert (layer.packed.workspace == 0).all()


@on_hopper
def test_ten_runs_give_the_same_bits_and_every_output_is_written():
    layer = build_layer(Int(4, 128), 4000, 4096)
    for m in (17, 64, 100, 256, 300):
        x_MI, launch = random_input(m, 4096), StreamLaunch(64, 264, 3, 3)
        first = run_stream(x_MI, layer.packed, launch)
        for _ in range(9):
            # The next output takes this memory.
            poison = torch.full_like(first, float("nan"))
            del poison
            assert torch.equal(run_stream(x_MI, layer.packed, launch), first), m
        assert (layer.packed.workspace == 0).all()


@pytest.mark.parametrize("m", [33, 64, 65, 128])
@pytest.mark.parametrize(("rows", "columns"), [(16, 256), (1024, 4096), (11008, 4096), (4096, 11008), (28672, 8192)])
def test_programs_share_tiles_evenly_or_fill_the_card(rows, columns, m):
    launch = stream_launch(GroupLayout(rows, columns, 4, 128, False, False), m, 132)
    tiles, fitting = -(-rows // STREAM_ROWS), STREAM[launch.block_m] * 132
    turns = tiles * -(-columns // 256)
    assert m <= launch.block_m
    assert launch.programs <= min(fitting, turns)
    assert launch.programs % tiles == 0 or launch.programs == min(fitting, turns)


@pytest.mark.parametrize(
    ("columns", "rows", "m", "programs"),
    [
        (4096, 11008, 64, 344), (4096, 22016, 64, 344), (11008, 4096, 64, 384), (4096, 12288, 64, 384),
        (8192, 8192, 64, 384), (8192, 8192, 128, 256), (4096, 11008, 128, 172),
    ],
)  # fmt: skip
def test_shapes_that_were_timed_have_the_fastest_number_of_programs(columns, rows, m, programs):
    assert stream_launch(GroupLayout(rows, columns, 4, 128, False, False), m, 132).programs == programs
