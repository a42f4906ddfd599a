"""Trellis codes: every weight is a window of L bits of one bit stream (after QTIP, arXiv 2406.11235).

A sequence is a tile of 16 x 16 weights, row by row: 256 k bits for k bits a weight, read as a ring.

    state_i = bits i k to i k + L - 1 of the tile's ring of 256 k bits          i = 16 row + column
    value_i = scale * table[state_i]                                            scale = f rms(x), one for the tensor

Neighbours share L - k bits of their states, so a weight chooses among 2^k values only once its neighbours are fixed,
but all 2^L values are in use, as a vector quantizer of high dimension would have it. The search for the best bits runs
from the last weight to the first, against which a state shifts new bits in at its low end (`viterbi.py`).

The value of a state s is a normal quantile, at a place that one multiplication of 32-bit integers finds:

    u = ((a s mod 2^32) + 1/2) / 2^32 - 1/2                        a by (L, k), see MULTIPLIERS
    table[s] = Φ⁻¹(u + 1/2)                           table "gaussian": 2^L values to keep
             = c_0 u + c_1 u³ + .. + c_4 u⁹           table "polynomial", its least-squares fit: nothing to keep

rounded to float16; u + 1/2 is kept within 2^-(L+1) of 0 and 1 in the first. The a are the best of some hundred on
normal values, of those for which the states that follow one state lie in different parts of the normal distribution,
as do those that one state follows. At 2 bits and L = 12 the error is 0.069 of the energy, that of a table in random
order 0.073; the bound is 4^-k.

A third table takes two integer operations a value and no look-up (the 1MAD code of the paper has the same idea): a sum
of four numbers that are nearly uniform is nearly normal,

    table[s] = sum of the four signed bytes of (a s mod 2^32) / 128         table "bytes", a from BYTE_MULTIPLIERS

Its mean square is 1.333, exact in float16. Integer tensor cores take the bytes as they are, and add them.

Packed layout. The codes of 16 rows are one row of bytes, tile after tile, 32 k bytes each; code i of a tile is the
lowest k bits of state_i, and lies at bits i k to i k + k - 1, bit b of a tile being bit b % 8 of byte b // 8. As 8 k
little-endian 32-bit words w of a tile:

    state_i = ((w[q] | w[(q + 1) % 8k] << 32) >> (i k % 32)) & (2^L - 1)        q = i k // 32,  L <= 16

Tile (r, c) of a matrix (O, I) starts at byte 2 k I r + 32 k c. At 2 bits a row of a tile is one word.

Shapes: L length of the block axis (in the equations above, bits of a state), R rows, C columns, N tiles, P weights of a
tile, S states, G blocks of all leading dims, g values of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lqer.components import require_choice, require_range
from lqer.formats.base import NumberFormat
from lqer.formats.rings import best_rings
from lqer.formats.scales import root_mean_square, storable
from lqer.formats.viterbi import SEARCH_BYTES

TILE = 16
POSITIONS = TILE * TILE
# Keys are (L, k).
MULTIPLIERS: dict[tuple[int, int], int] = {
    (12, 1): 0x8FCD7F41, (12, 2): 0xB98C67C3, (12, 3): 0xA0B55865, (12, 4): 0x774B15D7,
    (13, 1): 0x754A09CD, (13, 2): 0x42594053, (13, 3): 0x2188287F, (13, 4): 0x301850C5,
    (14, 1): 0x8CDB305F, (14, 2): 0xBD628881, (14, 3): 0xE1E437B7, (14, 4): 0xF22D2883,
    (15, 1): 0x6CAD4A27, (15, 2): 0xB4D66A3B, (15, 3): 0x230D977F, (15, 4): 0xF0CE5835,
    (16, 1): 0x7D2CAF83, (16, 2): 0x47469A4D, (16, 3): 0x6A50DF4D, (16, 4): 0x881ED163,
}  # fmt: skip
BYTE_MULTIPLIERS: dict[tuple[int, int], int] = {
    (12, 1): 0xDC6793B1, (12, 2): 0xEAB170B1, (12, 3): 0x2DAEBE23, (12, 4): 0x1385CEF3,
    (13, 1): 0xD5C41B99, (13, 2): 0x4B848A49, (13, 3): 0x4B848A49, (13, 4): 0x516D1AC9,
    (14, 1): 0xF33092B1, (14, 2): 0x74A35751, (14, 3): 0x33651037, (14, 4): 0x33651037,
    (15, 1): 0xDBD63381, (15, 2): 0x2E270E4D, (15, 3): 0x82BE7767, (15, 4): 0x409AE1F5,
    (16, 1): 0xE34D80AD, (16, 2): 0xDBDB3067, (16, 3): 0x4A7A09C7, (16, 4): 0xEF73B453,
}  # fmt: skip
# The root mean square of the values of table "bytes", those of uniform bytes.
BYTES_RMS = math.sqrt(4 * (256**2 - 1) / 12) / 128
TABLES = ("gaussian", "polynomial", "bytes")
POLYNOMIAL = (2.824, -20.286, 437.888, -2941.542, 6754.387)
# The scale of normal values with root mean square 1 that has the least error, by k, for values of mean square 1.
FACTOR = {1: 0.93, 2: 1.02, 3: 1.06, 4: 1.09}
LARGEST_VALUE = 4.5
# With more bits of a state than this, the search reads the table in float16, which still fits into a GPU's L1 cache.
LARGEST_FLOAT_TABLE = 13


@dataclass(frozen=True)
class Trellis(NumberFormat):
    """Trellis codes of a matrix; parts: uint8 "codes" [R / 16, 16 C], those of a tile one after the other, and float32
    "scales" [1, 1].

    Rows (all leading dims) and the axis are multiples of 16.
    """

    kind = "trellis"
    vector_size: ClassVar[int] = TILE
    vector_rows: ClassVar[int] = TILE
    trainable_parts: ClassVar[frozenset[str]] = frozenset({"scales"})

    bits: int
    state_bits: int = 12
    table: Literal["gaussian", "polynomial", "bytes"] = "gaussian"
    block_size: Literal["tensor"] = "tensor"

    def __post_init__(self) -> None:
        require_range("bits", self.bits, 1, 4, "trellis")
        require_range("state_bits", self.state_bits, 12, 16, "trellis")
        require_choice("table", self.table, list(TABLES), "trellis")
        require_choice("block_size", self.block_size, ["tensor"], "trellis")

    @property
    def stream_widths(self) -> dict[str, int]:
        return {"codes": self.bits}

    def stream_length(self, name: str, length: int) -> int:
        return TILE * length

    def bits_per_value(self, length: int) -> float:
        return self.bits

    def fit(self, x_Gg: Tensor) -> dict[str, Tensor]:
        """The scale f rms, float32 [1, .., 1]; 0 for zeros, NaN where there is NaN or infinity."""
        rms = root_mean_square(x_Gg.reshape(*[1] * (x_Gg.dim() - 1), -1))
        factor = FACTOR[self.bits] / (BYTES_RMS if self.table == "bytes" else 1.0)
        return {"scales": storable(factor * rms, torch.float32, LARGEST_VALUE)}

    def encode(self, x_Gg: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """uint8 codes [R / 16, 1, 16 g] of whole rows or of blocks of columns [R, 1, g].

        scales: of one matrix [1, 1], or [R, 1] of several whose rows follow each other.
        """
        rows, _, columns = x_Gg.shape
        if (unsupported_reason := self.unsupported_shape(rows, columns)) is not None:
            raise ValueError(unsupported_reason)
        x_NP = to_tiles(x_Gg.squeeze(1))
        scale_R = scales["scales"].to(torch.float32).flatten().expand(rows)
        scale_N1 = scale_R[::TILE].repeat_interleave(columns // TILE).unsqueeze(1)
        table_S = self.values(x_NP.device)
        if self.state_bits > LARGEST_FLOAT_TABLE:
            table_S = table_S.to(torch.float16)
        codes_NP = best_rings((x_NP / scale_N1.where(scale_N1 != 0, 1.0)).flip(1), table_S, self.bits)
        return codes_NP.flip(1).view(rows // TILE, 1, -1)

    def decode(self, codes_Gg: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """float32 values [R, 1, g] of codes [R / 16, 1, 16 g]."""
        states_NP = ring_states(codes_Gg.reshape(-1, POSITIONS), self.bits, self.state_bits)
        values_RC = from_tiles(self.values(codes_Gg.device)[states_NP], len(codes_Gg))
        return values_RC.mul_(scales["scales"].to(torch.float32).view(-1, 1)).unsqueeze(1)

    def fake_quantize(self, x: Tensor, axis: int = -1) -> Tensor:
        """`quantize(x, axis).dequantize(x.dtype)`: searches, so nothing for activations; refuses NaN."""
        return self.quantize(x, axis).dequantize(x.dtype)

    def quantize_parts(self, x_L: Tensor) -> dict[str, Tensor]:
        if x_L.dim() != 2:
            raise ValueError(f"a tensor of shape {tuple(x_L.shape)} is not a matrix (trellis)")
        x_R1C = x_L.unsqueeze(1)
        scales = self.fit(x_R1C)
        return {"codes": self.encode(x_R1C, scales).squeeze(1), **scales}

    def dequantize_parts(self, parts: dict[str, Tensor]) -> Tensor:
        return self.decode(parts["codes"].unsqueeze(1), parts).squeeze(1)

    def values(self, device: torch.device) -> Tensor:
        """float32 [S], exact in float16: the table."""
        return state_values(self.state_bits, self.bits, self.table, device)

    @property
    def encoding_bytes(self) -> int:
        return SEARCH_BYTES

    def unsupported_shape(self, rows: int, length: int) -> str | None:
        if rows % TILE or length % TILE:
            return f"its tiles are {TILE} x {TILE} weights, and the matrix is {rows} x {length} (trellis)"
        return None


def ring_states(codes_NP: Tensor, bits: int, state_bits: int) -> Tensor:
    """int64 states [N, P] of rings of codes: code p in the lowest bits, code p + 1 above it, and so on."""
    # Windows of one code, of two, of four, ..: each is two neighbouring ones of the length before.
    states_NP, width = codes_NP.to(torch.int64), 1
    while width * bits < state_bits:
        states_NP = states_NP | states_NP.roll(-width, dims=1) << (width * bits)
        width *= 2
    return states_NP & (1 << state_bits) - 1


def to_tiles(x_RC: Tensor) -> Tensor:
    """The tiles [N, 256] of a matrix, a row of tiles after the other; each row by row."""
    return x_RC.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE)).transpose(1, 2).reshape(-1, POSITIONS)


def from_tiles(x_NP: Tensor, tile_rows: int) -> Tensor:
    """The matrix [R, C] of tiles [N, 256] that `to_tiles` made: the inverse."""
    return x_NP.view(tile_rows, -1, TILE, TILE).transpose(1, 2).reshape(tile_rows * TILE, -1)


def multiplier(state_bits: int, bits: int, table: str) -> int:
    """A of the equations of the module's docstring."""
    return (BYTE_MULTIPLIERS if table == "bytes" else MULTIPLIERS)[state_bits, bits]


@lru_cache
def state_values(state_bits: int, bits: int, table: str, device: torch.device) -> Tensor:
    """float32 [S], exact in float16: the value of each state by the equations of the module's docstring."""
    product_S = torch.arange(1 << state_bits) * multiplier(state_bits, bits, table) % (1 << 32)
    if table == "bytes":
        byte_S4 = product_S.unsqueeze(1) >> torch.tensor([0, 8, 16, 24])
        return ((byte_S4 & 255 ^ 128) - 128).sum(1).to(device, torch.float32) / 128
    u_S = (product_S.to(torch.float64) + 0.5) / (1 << 32) - 0.5
    if table == "gaussian":
        tail = 0.5 / len(u_S)
        value_S = torch.special.ndtri((u_S + 0.5).clamp(tail, 1 - tail))
    else:
        value_S = sum((c * u_S.pow(2 * i + 1) for i, c in enumerate(POLYNOMIAL)), start=torch.zeros_like(u_S))
    return value_S.to(torch.float16).to(device, torch.float32)
