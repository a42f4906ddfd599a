"""Memory layout of trellis weights: a thread's windows of 32 weights lie at constant places of its words.

A ring of lqer.formats.trellis is a tile of 16 x 16 weights, 256 k bits. A row group of 16 rows by 128 columns is eight
rings side by side, and belongs to one warp. Lane 4 g + t holds rows 2 g and 2 g + 1 of ring t and of ring 4 + t: of
either one 32 consecutive weights, k words

    w[n] = word k g + n of the ring                n < k
    w[k] = w[0] of lane 4 (g + 1) + t              g + 1 mod 8: the ring goes on in the next lanes, at last in the first

    state of weight i = bits i k to i k + L - 1 of w                   i < 32, from the low end of w[0]

so a window is one shift of one or two registers and a mask, both constants. Words are stored so that a thread loads
four of them (k even) or two (k odd) at once,

    words    int32 [OP/16, tiles, P, 32, W]        [.., p, lane, j]: word p W + j of a lane's 2 k, of ring t first

Values are looked up in a table in shared memory, those of two neighbours at once if it is small enough:

    pairs     int32 [2^(L+k)]    by bits i k to i k + L + k - 1 of w: the float16 of weight i, and above it of i + 1
    singles   int32 [2^L]        by state: its float16, in both halves
    halves    float16 [2^16]     by state, if singles would be too large (L = 16)

Lanes read at random, and a bank serves one of them at a time. Copies of a small table, word by word side by side, give
a lane a share of the banks that it has with fewer others.

The four weights 4 j .. 4 j + 3 of row 2 g (2 g + 1) are row g (g + 8) of a tensor core operand for 16 columns, which
therefore hold columns 4 j .. 4 j + 3 of four rings. Tokens are float16 in natural order, x = step x', with a power of
two as step for each token and tile of 128 columns: exact for every element above 2^-28 of the largest in its tile.

Shapes: O out_features, I in_features, S states, P groups of W words, C codes of a row of rings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from lqer.formats import QuantizedTensor, Trellis, pack_bits
from lqer.formats.trellis import TABLES, TILE, from_tiles, multiplier, state_values
from lqer.kernels.layout.codes import ROWS
from lqer.kernels.layout.tiles import TILE_K, TiledLayout

LANES = 32
WEIGHTS = 32  # that a lane holds of a ring
RINGS = TILE_K // TILE  # of a row group; a lane holds two
# Words of codes that a thread loads before it decodes them.
WORDS_AHEAD = 32
# Bytes of a table: two of them, or one, fit into the shared memory of a multiprocessor.
LARGEST_TABLE = 128 << 10
COPIED_TABLE = 64 << 10


@dataclass(frozen=True)
class TrellisLayout(TiledLayout):
    """All that describes such a weight besides its tensors."""

    bits: int  # k
    state_bits: int  # L
    table_number: int  # of the table, in TABLES

    @property
    def table(self) -> str:
        return TABLES[self.table_number]

    @property
    def sums_bytes(self) -> bool:
        """Whether values are sums of the bytes of a product, computed (trellis/byte_sums.py) instead of looked up."""
        return self.table == "bytes"

    @property
    def multiplier(self) -> int:
        """a of lqer.formats.trellis."""
        return multiplier(self.state_bits, self.bits, self.table)

    @property
    def signed_multiplier(self) -> int:
        """The same modulo 2^32, as an int32."""
        return (self.multiplier ^ 1 << 31) - (1 << 31)

    @property
    def pairs(self) -> bool:
        """Whether two weights are looked up at once."""
        return 4 << self.index_bits(pairs=True) <= LARGEST_TABLE

    @property
    def halves(self) -> bool:
        return not self.pairs and 4 << self.state_bits > LARGEST_TABLE

    @property
    def copies(self) -> int:
        """Copies of the table, a power of two."""
        return max(1, COPIED_TABLE >> self.index_bits(self.pairs) + 2)

    @property
    def table_words(self) -> int:
        return self.copies << self.index_bits(self.pairs) >> self.halves

    def index_bits(self, pairs: bool) -> int:
        """Bits of the codes that one look-up takes."""
        return self.state_bits + (self.bits if pairs else 0)

    @property
    def tiles_ahead(self) -> int:
        """Tiles whose codes a thread loads before it decodes them."""
        return WORDS_AHEAD // (2 * self.bits)

    @property
    def words_at_once(self) -> int:
        """Words that a thread loads at once, W."""
        return 2 if self.bits % 2 else 4


@dataclass(frozen=True)
class PackedTrellis:
    """The tensors of one weight in the layout above.

    words: int32 [OP/16, tiles, P, 32, W]. scales: float32 [OP], alike in the rows of one linear.
    """

    layout: TrellisLayout
    words: Tensor
    scales: Tensor

    @property
    def parts(self) -> tuple[Tensor, None, Tensor, None]:
        """In the order of PackedWeight.parts."""
        return self.words, None, self.scales, None

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes


def pack_trellis(weight: QuantizedTensor) -> PackedTrellis:
    """Pack a "trellis" weight [O, I] with rows along axis 1, without loss.

    Raises ValueError for a weight along axis 0.
    """
    number_format = weight.format
    assert isinstance(number_format, Trellis)
    if len(weight.shape) != 2 or weight.axis != 1:
        raise ValueError(f"rows must be along axis 1 of a matrix, found axis {weight.axis} of {weight.shape}")
    bits = number_format.bits
    layout = TrellisLayout(*weight.shape, bits, number_format.state_bits, TABLES.index(number_format.table))
    # [OP/16, tiles, ring of four, t, g, words of g]: little-endian words of the packed layout.
    stream = pack_bits(weight.parts["codes"], bits).view(torch.int32)
    ring_words = TILE * TILE * bits // 32
    padding = (0, layout.tiles * RINGS * ring_words - stream.shape[1], 0, layout.padded_rows // ROWS - stream.shape[0])
    words = pad(stream, padding).view(-1, layout.tiles, 2, 4, 8, bits)
    at_once = layout.words_at_once
    words = words.permute(0, 1, 4, 3, 2, 5).reshape(-1, layout.tiles, LANES, 2 * bits // at_once, at_once)
    scales = weight.parts["scales"].to(torch.float32).reshape(1).repeat(layout.padded_rows)
    return PackedTrellis(layout, words.transpose(2, 3).contiguous(), scales)


def unpack_values(packed: PackedTrellis) -> Tensor:
    """The values of a weight's states, float32 [O, I], unscaled."""
    layout = packed.layout
    bits = layout.bits
    words = packed.words.transpose(2, 3).reshape(-1, layout.tiles, 8, 4, 2, bits).to(torch.int64) & 0xFFFFFFFF
    words = words.permute(0, 1, 4, 3, 2, 5).reshape(-1, 8 * bits)  # of rings, tile after tile
    bit = torch.arange(TILE * TILE, device=words.device) * bits
    first, second = words[:, bit // 32], words[:, (bit // 32 + 1) % (8 * bits)]
    states = (first >> bit % 32 | second << 32 - bit % 32) & (1 << layout.state_bits) - 1
    values = values_table(layout, words.device)[states]
    return from_tiles(values, layout.padded_rows // ROWS)[: layout.rows, : layout.columns]


def values_table(layout: TrellisLayout, device: torch.device) -> Tensor:
    """float32 [S], exact in float16."""
    return state_values(layout.state_bits, layout.bits, layout.table, device)


@lru_cache
def lookup_table(layout: TrellisLayout, device: torch.device) -> Tensor:
    """int32 [table_words]: the table above. On the device, because a CUDA graph must not copy from the host."""
    values_S = values_table(layout, device).to(torch.float16)
    if layout.halves:
        return values_S.view(torch.int32)
    index = torch.arange(1 << layout.index_bits(layout.pairs), device=device)
    following = index >> (layout.bits if layout.pairs else 0)
    pairs = torch.stack([values_S[index & (1 << layout.state_bits) - 1], values_S[following]], dim=1)
    return pairs.view(torch.int32).expand(-1, layout.copies).contiguous().flatten()
