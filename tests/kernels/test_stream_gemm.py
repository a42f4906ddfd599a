"""Four-bit codes and more than 16 tokens by the kernel whose warps have roles, which only a GPU runs.

`compile_for_hopper.py` compiles it without a GPU, where Triton checks that decoded codes lie as the operand of tensor
cores needs them. Decoding and the order of tokens are those of groups_wide.py and decode.py.
"""

from __future__ import annotations

import pytest
import torch
from kernel_layers import ON_GPU, build_layer, random_input, relative_error

from lqer.formats import Int, MXInt
from lqer.kernels.stream_launch import StreamLaunch, run_stream

on_hopper = pytest.mark.skipif(
    not ON_GPU or torch.cuda.get_device_capability() != (9, 0), reason="kernels in Gluon have no interpreter"
)
INTEGERS = [Int(4, 128), Int(4, 128, symmetric=True, scale_dtype="bfloat16"), Int(4, 256), Int(4, "row")]
BLOCKS = [MXInt(4), MXInt(4, 32), MXInt(4, 64), MXInt(4, 256), MXInt(4, levels="mid-rise")]
KINDS = [(kind, dtype) for kind in INTEGERS for dtype in (torch.bfloat16, torch.float16)]
KINDS += [(kind, torch.bfloat16) for kind in BLOCKS]
# Of weights that are rounded to bfloat16 through two scales: next to ties they are rounded the other way.
TOLERANCE = {torch.bfloat16: 1e-4, torch.float16: 2e-6}


@on_hopper
@pytest.mark.parametrize(("number_format", "dtype"), KINDS, ids=str)
def test_products_are_those_of_rounded_weights(number_format, dtype):
    layer = build_layer(number_format, 200, 1040, bias=True, dtype=dtype)
    # Whole tiles, parts of tiles within and beyond a program, a turn each.
    for block_m, blocks, programs in ((64, 1, 2), (64, 1, 3), (64, 2, 1), (64, 2, 7), (128, 1, 264)):
        for tokens in (1, block_m, block_m + 5):
            x_MI = random_input(tokens, 1040, dtype)
            y_MO = run_stream(x_MI, layer.packed, StreamLaunch(block_m, blocks, programs, 3), torch.float32)
            assert relative_error(y_MO, layer.exact(x_MI)) < TOLERANCE[dtype], (block_m, blocks, programs, tokens)
    assert (layer.packed.workspace == 0).all()


@on_hopper
def test_ten_runs_give_the_same_bits_and_every_output_is_written():
    layer = build_layer(Int(4, 128), 4000, 4096)
    for m in (17, 64, 100, 256, 300):
        x_MI, launch = random_input(m, 4096), StreamLaunch(64, 2, 264, 4)
        first = run_stream(x_MI, layer.packed, launch)
        for _ in range(9):
            # The next output takes this memory.
            poison = torch.full_like(first, float("nan"))
            del poison
            assert torch.equal(run_stream(x_MI, layer.packed, launch), first), m
        assert (layer.packed.workspace == 0).all()
