"""Shards of a linear hold its values, and together they compute what it does.

Shapes: T tokens, I in_features, O out_features.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stored_linears import stored_linear
from torch import Tensor

from lqer.checkpoint.linear import LinearTensors, read_linear
from lqer.errors import ModelError
from lqer.formats import (
    E8P,
    MX,
    Codebook,
    Int,
    MXInt,
    NormalFloat,
    NumberFormat,
    Passthrough,
    Trellis,
)
from lqer.serve.layer import LayerShard
from lqer.serve.modules import SideBySide, SummedBranch
from lqer.serve.shards import input_shard, join_outputs, output_shard
from lqer.serve.stored import StoredLinear

CPU, FLOAT = torch.device("cpu"), torch.float32
OUTPUTS, INPUTS = 64, 128
X8 = MXInt(bits=8, block_size=16)
SHARDABLE: list[NumberFormat] = [
    *(MXInt(bits=bits, block_size=16) for bits in range(2, 9)),
    MXInt(bits=3, block_size=32, scale_rounding="floor"),
    MXInt(bits=4, block_size=16, levels="mid-rise"),
    *(Int(bits=bits, block_size=32) for bits in range(2, 9)),
    *(Int(bits=bits, block_size=32, symmetric=True) for bits in (2, 4, 8)),
    Int(bits=4, block_size="row"),
    Int(bits=8, block_size="row", symmetric=True, scale_dtype="float32"),
    *(MX(element) for element in ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4_e2m1", "mxint8")),
    NormalFloat(bits=4, block_size=32),
    Codebook(bits=2, dimension=2, group_size=512, block_size=32),
    E8P(bits=2),
    E8P(bits=4),
    Trellis(bits=2),
]


def one(weight: NumberFormat, outputs: int = OUTPUTS, inputs: int = INPUTS, **more: Any) -> LinearTensors:
    tensors, entry = stored_linear("l", weight, outputs, inputs, **more)
    return read_linear(tensors, "l", entry, CPU)


def inputs_of(linear: LinearTensors, tokens: int = 5) -> Tensor:
    return torch.randn(tokens, linear.weight.shape[1], generator=torch.Generator().manual_seed(9))


def split_outputs(linear: LinearTensors, ranks: int) -> list[LinearTensors]:
    count = linear.weight.shape[0] // ranks
    return [output_shard(linear, rank * count, count) for rank in range(ranks)]


def split_inputs(linear: LinearTensors, ranks: int) -> list[LinearTensors]:
    count = linear.weight.shape[1] // ranks
    return [input_shard(linear, rank * count, count) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("weight", SHARDABLE, ids=str)
def test_gathered_shards_are_the_weight(weight, ranks):
    linear = one(weight)
    by_outputs = [shard.weight.dequantize() for shard in split_outputs(linear, ranks)]
    assert torch.equal(torch.cat(by_outputs, 0), linear.weight.dequantize())
    by_inputs = [shard.weight.dequantize() for shard in split_inputs(linear, ranks)]
    assert torch.equal(torch.cat(by_inputs, 1), linear.weight.dequantize())


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("factor", [MXInt(bits=8), Passthrough("float16"), Int(bits=4, block_size=16)], ids=str)
def test_shards_compute_what_the_linear_does(factor, ranks):
    linear = one(MXInt(bits=3), rank=16, factor=factor, bias=MXInt(bits=8))
    x = inputs_of(linear)
    expected = linear.module("emulate", FLOAT)(x)
    by_outputs = [shard.module("emulate", FLOAT)(x) for shard in split_outputs(linear, ranks)]
    torch.testing.assert_close(torch.cat(by_outputs, -1), expected, rtol=0, atol=1e-5)
    shards = zip(split_inputs(linear, ranks), x.chunk(ranks, -1), strict=True)
    y = sum(shard.module("emulate", FLOAT)(part) for shard, part in shards)
    # Every rank has the whole bias: whoever runs them adds it once.
    torch.testing.assert_close(y - (ranks - 1) * linear.bias_O, expected, rtol=0, atol=1e-5)


def test_rounded_outputs_are_those_of_the_whole_if_blocks_are():
    linear = one(MXInt(bits=3), rank=16, activation=X8)
    x = inputs_of(linear)
    y = torch.cat([shard.module("emulate", FLOAT)(x) for shard in split_outputs(linear, 4)], -1)
    torch.testing.assert_close(y, linear.module("emulate", FLOAT)(x), rtol=0, atol=1e-5)


def layer_of(
    parts: list[tuple[dict, dict]], inputs: int, outputs: list[int], rank: int, ranks: int, reduce: Any = None
):
    """The module and the bias of one rank, from tensors that arrive in no order."""
    linears = [StoredLinear(f"l{place}", entry) for place, (_, entry) in enumerate(parts)]
    shard = LayerShard(linears, inputs, outputs, rank, ranks, FLOAT, reduce)
    arriving = [(place, key.split(".", 1)[1], tensor) for place, (tensors, _) in enumerate(parts)
                for key, tensor in tensors.items()]  # fmt: skip
    for place, part, tensor in sorted(arriving, key=lambda item: item[1]):
        shard.add(place, part, tensor, CPU)
    return shard.finish()


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_rounded_product_of_the_factors_is_of_the_sum_over_ranks(ranks):
    tensors, entry = stored_linear("l0", MXInt(bits=3), OUTPUTS, INPUTS, rank=16, activation=X8)
    whole, _ = layer_of([(tensors, entry)], INPUTS, [OUTPUTS], 0, 1)
    x = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(9))
    total: list[Tensor] = []
    modules = [
        layer_of([(tensors, entry)], INPUTS // ranks, [OUTPUTS], rank, ranks, lambda _: total[0])[0]
        for rank in range(ranks)
    ]
    assert all(isinstance(module, SummedBranch) for module in modules)
    parts = x.chunk(ranks, -1)
    total.append(sum(X8.fake_quantize(part) @ module.a for part, module in zip(parts, modules, strict=True)))
    y = sum(module(part) for part, module in zip(parts, modules, strict=True))
    torch.testing.assert_close(y, whole(x), rtol=0, atol=1e-5)
    separate = sum(shard.module("emulate", FLOAT)(part) for shard, part in
                   zip(split_inputs(read_linear(tensors, "l0", entry, CPU), ranks), parts, strict=True))  # fmt: skip
    assert not torch.allclose(separate, whole(x), rtol=0, atol=1e-3), "rounded on each rank it is something else"


@pytest.mark.parametrize(
    ("weight", "more", "split", "rule"),
    [
        (Int(bits=4, block_size=128), {"inputs": 288}, split_inputs, "weight: 144 is not a multiple of block_size 128"),
        (MXInt(bits=4, block_size=32), {"inputs": 288}, split_inputs, "weight: 144 is not a multiple of block_size 32"),
        (Trellis(bits=2), {"outputs": 48}, split_outputs, "24 is not a multiple of the rows of a tile 16"),
        (E8P(bits=2), {"inputs": 40}, split_inputs, "20 is not a multiple of the values of a code 8"),
        (Codebook(bits=2, dimension=2, group_size=512, block_size=128), {}, split_inputs, "the columns of a codebook"),
        (MXInt(bits=4), {"hadamard": True}, split_outputs, "mixes all outputs, so they cannot be split"),
        (MXInt(bits=4), {"hadamard": True}, split_inputs, "mixes all inputs, so they cannot be split"),
        (MXInt(bits=4), {"activation": Int(8, "row")}, split_inputs, 'all inputs are rounded under one scale'),
        (MXInt(bits=4), {"activation": MXInt(8, 64), "inputs": 192}, split_inputs, "rounded in blocks of 64, and 96"),
        (MXInt(bits=4), {"activation": X8, "rank": 16, "outputs": 48}, split_outputs, "in blocks of 16, and 24 is no"),
        (MXInt(bits=4), {"rank": 16, "factor": MXInt(8, 32), "inputs": 96}, split_inputs, "low_rank_a: 48 is not"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_refused_with_the_rule(weight, more, split, rule):
    with pytest.raises(ValueError, match=rule):
        split(one(weight, **more), 2)


def test_a_layer_says_which_linear_it_cannot_split():
    tensors, entry = stored_linear("l0", Int(bits=4, block_size=128), 64, 288)
    with pytest.raises(ModelError, match=r"^l0 cannot be split over 2 ranks: weight: 144 is not a multiple of"):
        layer_of([(tensors, entry)], 144, [64], 0, 2)
    with pytest.raises(ModelError, match="l0: a rank cannot hold 48 x 288 out of 64 x 288"):
        layer_of([(tensors, entry)], 288, [48], 0, 2)
    with pytest.raises(ModelError, match="l0 is one matrix for 3 linears"):
        layer_of([(tensors, entry)], 288, [16, 8, 8], 0, 2)


def test_a_missing_tensor_is_named():
    tensors, entry = stored_linear("l0", Int(bits=4, block_size=32), 64, 128)
    with pytest.raises(ModelError, match=r"the checkpoint has no tensor l0.weight.zeros"):
        layer_of([({key: part for key, part in tensors.items() if "zeros" not in key}, entry)], 128, [64], 0, 1)


@pytest.mark.parametrize("more", [{}, {"rank": 16}, {"rank": 16, "activation": X8}], ids=str)
def test_linears_of_one_input_become_one(more):
    parts = [stored_linear(f"l{place}", MXInt(bits=4), outputs, INPUTS, seed=place, **more)
             for place, outputs in enumerate((64, 32, 32))]  # fmt: skip
    linears = [read_linear(tensors, f"l{place}", entry, CPU) for place, (tensors, entry) in enumerate(parts)]
    joined, x = join_outputs(linears), inputs_of(linears[0])
    assert joined.weight.shape == (128, INPUTS)
    expected = torch.cat([linear.module("emulate", FLOAT)(x) for linear in linears], -1)
    torch.testing.assert_close(joined.module("emulate", FLOAT)(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("of_first", "of_second"),
    [
        ({}, {"weight": MXInt(bits=3)}),
        ({"rank": 16}, {}),
        ({"activation": X8}, {}),
        ({"weight": E8P(bits=2)}, {"weight": E8P(bits=2)}),
        ({"hadamard": True}, {"hadamard": True}),
        ({"rank": 8, "activation": X8}, {"rank": 8, "activation": X8}),
    ],
    ids=str,
)
def test_linears_that_are_not_alike_run_one_after_another(of_first, of_second):
    parts = [stored_linear(f"l{place}", settings.pop("weight", MXInt(bits=4)), 32, INPUTS, seed=place, **settings)
             for place, settings in enumerate((dict(of_first), dict(of_second)))]  # fmt: skip
    linears = [read_linear(tensors, f"l{place}", entry, CPU) for place, (tensors, entry) in enumerate(parts)]
    with pytest.raises(ValueError):
        join_outputs(linears)
    module, _ = layer_of(parts, INPUTS, [32, 32], 0, 1)
    assert isinstance(module, SideBySide)
    x = inputs_of(linears[0])
    expected = torch.cat([linear.module("emulate", FLOAT)(x) for linear in linears], -1)
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_beyond_the_heads_of_keys_hold_those_of_their_neighbours(ranks):
    parts = [stored_linear(f"l{place}", MXInt(bits=4), outputs, INPUTS, seed=place, bias=MXInt(bits=8))
             for place, outputs in enumerate((128, 64, 64))]  # fmt: skip
    kv_heads, head = 4, 16
    share = max(1, kv_heads // ranks) * head
    q, k, v = (read_linear(tensors, f"l{place}", entry, CPU) for place, (tensors, entry) in enumerate(parts))
    for rank in range(ranks):
        module, bias_O = layer_of(parts, INPUTS, [128 // ranks, share, share], rank, ranks)
        first = rank // max(1, ranks // kv_heads) * share
        rows = [(q, rank * 128 // ranks, 128 // ranks), (k, first, share), (v, first, share)]
        expected = torch.cat([one.weight.dequantize()[start : start + count] for one, start, count in rows])
        torch.testing.assert_close(module(torch.eye(INPUTS)).T, expected, rtol=0, atol=0)
        assert torch.equal(bias_O, torch.cat([one.bias_O[start : start + count] for one, start, count in rows]))
