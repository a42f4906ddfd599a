"""Pieces of quantized matrices have the values that were there, and joined they are the matrix again."""

from __future__ import annotations

import pytest
import torch

from lqer.formats import (
    E8P,
    MX,
    Codebook,
    Int,
    MXInt,
    NormalFloat,
    NumberFormat,
    Passthrough,
    QuantizedTensor,
    Trellis,
    cut,
    join,
)

FORMATS = [
    MXInt(bits=4, block_size=16),
    MXInt(bits=3, block_size=32, levels="mid-rise"),
    MXInt(bits=5, block_size="row"),
    Int(bits=3, block_size=32),
    Int(bits=4, block_size=16, symmetric=True),
    Int(bits=8, block_size="row", symmetric=True),
    MX("mxfp4_e2m1"),
    MX("mxfp6_e2m3"),
    NormalFloat(bits=4, block_size=32),
    Passthrough("bfloat16"),
]
OF_TENSORS = [E8P(bits=2), E8P(bits=3), Trellis(bits=2), NormalFloat(bits=2, block_size="tensor")]
WITH_CODEBOOKS = [
    Codebook(bits=2, dimension=2, group_size=512, block_size=32),
    Codebook(bits=2, dimension=1, group_size=512, block_size=32, scale_block_size=32, codebook_rank=2),
]


def quantized(number_format: NumberFormat, rows: int = 64, length: int = 128, axis: int = 1) -> QuantizedTensor:
    x = torch.randn(rows, length, generator=torch.Generator().manual_seed(0))
    return number_format.quantize(x if axis == 1 else x.T.contiguous(), axis)


def stored(tensor: QuantizedTensor) -> QuantizedTensor:
    """The tensor after a way through its packed bytes."""
    return tensor.format.unpack(tensor.pack(), tensor.shape, tensor.axis)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("number_format", FORMATS + OF_TENSORS + WITH_CODEBOOKS, ids=str)
def test_pieces_have_the_values_of_the_matrix(number_format, axis, dim, ranks):
    whole = quantized(number_format, axis=axis)
    count = whole.shape[dim] // ranks
    for start in range(0, whole.shape[dim], count):
        piece = stored(cut(whole, dim, start, count))
        assert torch.equal(piece.dequantize(), whole.dequantize().narrow(dim, start, count))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_joined_pieces_are_the_bytes_of_the_matrix(number_format, dim, ranks):
    whole = quantized(number_format)
    count = whole.shape[dim] // ranks
    pieces = [cut(whole, dim, start, count) for start in range(0, whole.shape[dim], count)]
    if dim == 1 and number_format.block_size == "row" and len(whole.parts) > 1:
        with pytest.raises(ValueError, match="a row of each piece has a scale of its own"):
            join(pieces, dim)
        return
    joined = join(pieces, dim)
    assert joined.shape == whole.shape
    for name, part in whole.pack().items():
        assert torch.equal(joined.pack()[name], part), name


@pytest.mark.parametrize(
    ("number_format", "dim", "edge", "rule"),
    [
        (Int(bits=4, block_size=128), 1, 144, "144 is not a multiple of block_size 128"),
        (MXInt(bits=4, block_size=32), 1, 48, "48 is not a multiple of block_size 32"),
        (Trellis(bits=2), 0, 8, "8 is not a multiple of the rows of a tile 16"),
        (Trellis(bits=2), 1, 8, "8 is not a multiple of the values of a code 16"),
        (E8P(bits=2), 1, 12, "12 is not a multiple of the values of a code 8"),
        (Codebook(bits=2, dimension=2, group_size=512, block_size=32), 0, 8, "8 is not a multiple of the rows of a"),
    ],
    ids=str,
)
def test_a_piece_that_would_share_a_block_is_refused(number_format, dim, edge, rule):
    whole = quantized(number_format, length=288)
    with pytest.raises(ValueError, match=rule):
        cut(whole, dim, 0, edge)
    with pytest.raises(ValueError, match=rule):
        cut(whole, dim, edge, 16)


def test_a_ragged_last_block_goes_with_the_last_piece():
    whole = quantized(Int(bits=4, block_size=128), length=160)
    last = cut(whole, 1, 128, 32)
    assert torch.equal(stored(last).dequantize(), whole.dequantize()[:, 128:])
    assert torch.equal(join([cut(whole, 1, 0, 128), last], 1).dequantize(), whole.dequantize())


@pytest.mark.parametrize(("start", "count"), [(-1, 4), (0, 0), (60, 8)])
def test_a_piece_outside_the_matrix_is_refused(start, count):
    with pytest.raises(ValueError, match="is not a part of 0:"):
        cut(quantized(MXInt(bits=4)), 0, start, count)


@pytest.mark.parametrize("number_format", OF_TENSORS + WITH_CODEBOOKS, ids=str)
def test_what_a_tensor_has_once_is_not_joined(number_format):
    whole = quantized(number_format)
    with pytest.raises(ValueError, match="scales or codebooks of its own"):
        join([whole, whole], 0)


def test_pieces_of_different_formats_are_not_joined():
    with pytest.raises(ValueError, match="the formats of the pieces differ"):
        join([quantized(MXInt(bits=4)), quantized(MXInt(bits=3))], 0)
