"""The bit stream: layout, round trips, refusals."""

import pytest
import torch

from lqer.formats import pack_bits, packed_length, unpack_bits

WIDTHS = range(1, 9)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("length", [1, 7, 8, 9, 20, 64])
def test_unpacking_gives_back_the_codes(bits, length):
    codes = torch.randint(0, 1 << bits, (3, 2, length), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (3, 2, packed_length(length, bits))
    assert torch.equal(unpack_bits(packed, length, bits), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_survives_in_every_position(bits):
    codes = torch.arange(1 << bits, dtype=torch.uint8)
    rows = torch.stack([codes.roll(shift) for shift in range(8)])
    assert torch.equal(unpack_bits(pack_bits(rows, bits), 1 << bits, bits), rows)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_stream_is_the_little_endian_integer_of_the_codes(bits):
    codes = torch.randint(0, 1 << bits, (21,), dtype=torch.uint8)
    stream = sum(code << (i * bits) for i, code in enumerate(codes.tolist()))
    assert bytes(pack_bits(codes, bits).tolist()) == stream.to_bytes(packed_length(21, bits), "little")


def test_a_strided_tensor_packs_like_its_contiguous_copy():
    codes = torch.randint(0, 8, (24, 5), dtype=torch.uint8).t()
    assert torch.equal(pack_bits(codes, 3), pack_bits(codes.contiguous(), 3))


def test_a_tensor_without_rows_packs_to_one_without_rows():
    packed = pack_bits(torch.zeros(0, 16, dtype=torch.uint8), 3)
    assert packed.shape == (0, 6)
    assert unpack_bits(packed, 16, 3).shape == (0, 16)


@pytest.mark.parametrize("bits", [0, 9])
def test_a_width_that_no_byte_stream_has_is_refused(bits):
    with pytest.raises(ValueError, match=rf"bits {bits} is not in 1\.\.8"):
        pack_bits(torch.zeros(8, dtype=torch.uint8), bits)


def test_codes_that_are_not_bytes_are_refused():
    with pytest.raises(ValueError, match=r"torch\.uint8, found torch\.int8"):
        pack_bits(torch.zeros(8, dtype=torch.int8), 4)


def test_a_row_with_the_wrong_number_of_bytes_is_refused():
    with pytest.raises(ValueError, match="9 codes of 4 bits take 5 bytes a row, found 4"):
        unpack_bits(torch.zeros(2, 4, dtype=torch.uint8), 9, 4)
