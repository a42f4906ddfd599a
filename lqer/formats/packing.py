"""Codes of 1 to 8 bits as a stream of bytes.

Each row (the last dim) is its own little-endian bit stream: element i occupies bits i*bits to (i+1)*bits - 1 of the
row, and bit k of a row is bit k % 8 of its byte k // 8. Element 0 therefore sits in the lowest bits of byte 0; with 1,
2, 4 or 8 bits no element crosses a byte. The unused high bits of a row's last byte are zero.

Eight codes fill exactly `bits` bytes, so the loops below run over eight code positions, never over elements.

Shapes: L elements of a row, G groups of eight elements, R all leading dims, P bytes of a row, b bits of an element.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

CODES_PER_GROUP = 8


def packed_length(length: int, bits: int) -> int:
    """Bytes that one row of `length` codes takes."""
    return -(-length * bits // 8)


def pack_bits(codes_RL: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [*R, L], each below 2**bits, into uint8 bytes [*R, ceil(L * bits / 8)].

    Raises ValueError when `bits` is not in 1..8 or the codes are not uint8.
    """
    _check(codes_RL, bits)
    length = codes_RL.shape[-1]
    groups = -(-length // CODES_PER_GROUP)
    codes_RG8 = pad(codes_RL, (0, groups * CODES_PER_GROUP - length)).unflatten(-1, (groups, CODES_PER_GROUP))
    bytes_RGb = codes_RG8.new_zeros((*codes_RG8.shape[:-1], bits))
    for i in range(CODES_PER_GROUP):
        byte, shift = divmod(i * bits, 8)
        bytes_RGb[..., byte] |= codes_RG8[..., i] << shift  # uint8 drops what belongs to the next byte
        if shift + bits > 8:
            bytes_RGb[..., byte + 1] |= codes_RG8[..., i] >> (8 - shift)
    return bytes_RGb.flatten(-2)[..., : packed_length(length, bits)].contiguous()


def unpack_bits(packed_RP: Tensor, length: int, bits: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 codes [*R, length] from uint8 bytes [*R, ceil(length * bits / 8)].

    Raises ValueError when `bits` is not in 1..8, the bytes are not uint8, or a row has the wrong number of bytes.
    """
    _check(packed_RP, bits)
    expected = packed_length(length, bits)
    if packed_RP.shape[-1] != expected:
        raise ValueError(f"{length} codes of {bits} bits take {expected} bytes a row, found {packed_RP.shape[-1]}")
    groups = -(-length // CODES_PER_GROUP)
    bytes_RGb = pad(packed_RP, (0, groups * bits - expected)).unflatten(-1, (groups, bits))
    codes_RG8 = bytes_RGb.new_empty((*bytes_RGb.shape[:-1], CODES_PER_GROUP))
    for i in range(CODES_PER_GROUP):
        byte, shift = divmod(i * bits, 8)
        code_RG = bytes_RGb[..., byte] >> shift
        if shift + bits > 8:
            code_RG |= bytes_RGb[..., byte + 1] << (8 - shift)
        torch.bitwise_and(code_RG, (1 << bits) - 1, out=codes_RG8[..., i])
    return codes_RG8.flatten(-2)[..., :length].contiguous()


def _check(tensor: Tensor, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits {bits} is not in 1..8 (packing)")
    if tensor.dtype != torch.uint8:
        raise ValueError(f"packing works on torch.uint8, found {tensor.dtype}")
