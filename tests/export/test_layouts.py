"""The bytes of every layout, against vectors that the other libraries' own packers and readers have confirmed.

vectors.json holds 32 x 64 weights as a checkpoint stores them, and the sha256 of the bytes of each tensor of the other
formats; compressed-tensors 0.20 and gguf 0.19 decode those tensors to the checkpoint's values. Scales of empty blocks
of MXINT, on which nothing depends, are 2^-14.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize

from lqer.errors import ExportError
from lqer.export.awq import Awq, awq_tensors
from lqer.export.compressed_tensors import packed_weight
from lqer.export.gguf_blocks import blocks_of, unsupported_blocks
from lqer.export.gguf_names import interleaved
from lqer.export.gptq import Gptq, gptq_tensors
from lqer.export.integers import integer_schemes, integers_of, unsupported_integers
from lqer.export.source import Linear, LinearSpec
from lqer.formats import Int, MXInt, format_from_dict

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())
INTEGERS = [name for name in VECTORS if unsupported_integers(format_from_dict(VECTORS[name]["format"])) is None]


def linear(name: str) -> Linear:
    vector = VECTORS[name]
    number_format = format_from_dict(vector["format"])
    packed = {
        part: torch.frombuffer(bytearray.fromhex(stored["hex"]), dtype=getattr(torch, stored["dtype"])).reshape(
            stored["shape"]
        )
        for part, stored in vector["packed"].items()
    }
    weight_OI = number_format.unpack(packed, vector["shape"], 1)
    spec = LinearSpec("layer.linear", number_format, *vector["shape"])
    return Linear(spec, weight_OI, None, None, None, None)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:32]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, dict]) -> None:
    assert {name: [list(t.shape), digest(t)] for name, t in found.items()} == {
        name: [one["shape"], one["sha256"]] for name, one in expected.items()
    }


@pytest.mark.parametrize("name", VECTORS)
def test_compressed_tensors_are_those_of_the_library(name):
    one = linear(name)
    found = packed_weight(one, integer_schemes([one.spec])[one.name])
    if VECTORS[name]["layout"] == "pack-quantized":
        # On disk powers of two are bfloat16; the vectors have every scale in float32.
        found["weight_scale"] = found["weight_scale"].float()
    assert_same(found, VECTORS[name]["compressed_tensors"])


@pytest.mark.parametrize("name", [name for name in VECTORS if "gptq_v2" in VECTORS[name]])
def test_gptq_is_that_of_the_vectors_and_version_1_refuses_a_zero_point_of_zero(name):
    one = linear(name)
    integers = integers_of(one.weight_OI)
    assert_same(gptq_tensors(integers, one.spec, 0), VECTORS[name]["gptq_v2"])
    if isinstance(VECTORS[name]["gptq_v1"], str):
        with pytest.raises(ExportError, match=r"layer\.linear: a zero point is 0.*--version=2"):
            gptq_tensors(integers, one.spec, 1)
    else:
        assert_same(gptq_tensors(integers, one.spec, 1), VECTORS[name]["gptq_v1"])


@pytest.mark.parametrize("name", VECTORS)
def test_awq_is_that_of_the_vectors_and_takes_four_bits_only(name):
    one = linear(name)
    if "awq_gemm" in VECTORS[name]:
        assert Awq().unsupported(one.spec) is None
        assert_same(awq_tensors(integers_of(one.weight_OI), one.spec), VECTORS[name]["awq_gemm"])
    else:
        assert Awq().unsupported(one.spec) is not None


@pytest.mark.parametrize("name", VECTORS)
def test_gguf_blocks_are_those_of_the_vectors_and_decode_to_the_checkpoint(name):
    one, expected = linear(name), VECTORS[name]["gguf"]
    if isinstance(expected, str):
        assert unsupported_blocks(one.spec) is not None
        return
    assert unsupported_blocks(one.spec) is None
    block_type, rows_OP = blocks_of(one.weight_OI, one.spec)
    decoded = dequantize(rows_OP.numpy(), block_type)
    np.testing.assert_array_equal(decoded, one.weight_OI.dequantize().numpy())
    assert block_type.name == expected["type"]
    if name != "mxint4_b32":  # whose empty block has another scale
        assert hashlib.sha256(rows_OP.numpy().tobytes()).hexdigest() == expected["sha256"]


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_times_scales_are_the_values(name):
    one = linear(name)
    integers = integers_of(one.weight_OI)
    scales_OI = integers.scales_OG.repeat_interleave(integers.group, dim=1)
    assert torch.equal(integers.signed() * scales_OI, one.weight_OI.dequantize())


def test_a_ragged_last_group_becomes_smaller_groups_that_divide_the_row():
    number_format = Int(bits=4, block_size=64)
    weight_OI = number_format.quantize(torch.randn(8, 160, generator=torch.Generator().manual_seed(0)), axis=1)
    spec = LinearSpec("linear", number_format, 8, 160)
    scheme = integer_schemes([spec])["linear"]
    integers = integers_of(weight_OI).regrouped(scheme.group)
    assert scheme.group == 32
    assert integers.scales_OG.shape == (8, 5)
    assert torch.equal(integers.signed() * integers.scales_OG.repeat_interleave(32, dim=1), weight_OI.dequantize())


def test_linears_of_one_format_share_a_group_size_whatever_their_widths():
    number_format = Int(bits=4, block_size=128)
    specs = [LinearSpec(str(width), number_format, 8, width) for width in (576, 1536)]
    assert {scheme.group for scheme in integer_schemes(specs).values()} == {64}


def test_a_scale_that_float16_cannot_hold_is_refused_by_name():
    weight_OI = MXInt(bits=4, block_size=32).quantize(torch.full((8, 32), 2.0**-30), axis=1)
    spec = LinearSpec("layer.linear", weight_OI.format, 8, 32)
    assert Gptq().unsupported(spec) is None
    for write in (lambda: gptq_tensors(integers_of(weight_OI), spec, 1), lambda: blocks_of(weight_OI, spec)):
        with pytest.raises(ExportError, match=r"layer\.linear: a scale is not a float16"):
            write()


def test_blocks_of_16_share_the_smaller_scale_and_are_refused_where_they_lie_too_far_apart():
    number_format = MXInt(bits=4, block_size=16)
    near = number_format.quantize(torch.tensor([[1.0] * 16 + [1 / 16] * 16]), axis=1)
    spec = LinearSpec("layer.linear", number_format, 1, 32)
    block_type, rows_OP = blocks_of(near, spec)
    assert block_type == GGMLQuantizationType.Q8_0
    np.testing.assert_array_equal(dequantize(rows_OP.numpy(), block_type), near.dequantize().numpy())
    far = number_format.quantize(torch.tensor([[1.0] * 16 + [2.0**-9] * 16]), axis=1)
    with pytest.raises(ExportError, match=r"layer\.linear: .*too far apart"):
        blocks_of(far, spec)


def test_an_empty_block_of_16_takes_the_scale_of_its_neighbour():
    number_format = MXInt(bits=4, block_size=16)
    weight_OI = number_format.quantize(torch.tensor([[0.0] * 16 + [2.0**9] * 16]), axis=1)
    block_type, rows_OP = blocks_of(weight_OI, LinearSpec("linear", number_format, 1, 32))
    np.testing.assert_array_equal(dequantize(rows_OP.numpy(), block_type), weight_OI.dequantize().numpy())


def test_llama_rows_are_interleaved_by_head():
    assert interleaved(16, 2).tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
