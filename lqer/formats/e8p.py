"""E8P: eight weights share one point of a codebook in the E8 lattice (QuIP#, arXiv 2402.04396; CALDERA, 2405.18886).

    s     = rms(x) / opt_scale                      one per tensor, or per block
    2 bit   value = s p1                            p1 = nearest E8P point to x / s                     16 bits of code
    3 bit   value = s (p1 + p2 / 2.04)              p2 = nearest E8 1-bit point to 2.04 (x / s - p1)    24 bits
    4 bit   value = s (p1 + p2 / 3.45)              p2 = nearest E8P point to 3.45 (x / s - p1)         32 bits

for every vector of eight neighbours along the axis. opt_scale is 1.03, 0.98 and 1.03 unless given. The codebooks and
the search, which is exact for each of the two points, are in `e8.py`. The codebook is made for values that are nearly
normal, which a random Hadamard transform makes of any weight. It has no zero: only a tensor or block of zeros decodes
to zeros.

Shapes: L length of the block axis, G blocks of all leading dims, g values of a block, V vectors of 8 coordinates,
P bytes of a row, W bytes of a code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lqer.components import require_choice, require_range
from lqer.formats.base import NumberFormat, require_block_size
from lqer.formats.blocks import BlockSize, scale_groups
from lqer.formats.e8 import DIMENSION, LARGEST_COORDINATE, e8_one_bit_points, e8p_points
from lqer.formats.e8_search import nearest_e8_one_bit, nearest_e8p
from lqer.formats.scales import SCALE_DTYPES, ScaleDtype, root_mean_square, storable

FIRST_BITS = 16
FIRST_MASK = (1 << FIRST_BITS) - 1
OPT_SCALE = {2: 1.03, 3: 0.98, 4: 1.03}
RESIDUAL_SCALE = {3: 2.04, 4: 3.45}
LARGEST_OPT_SCALE = 16.0


@dataclass(frozen=True)
class E8P(NumberFormat):
    """Lattice codes; parts: int64 "codes" [*lead, ceil(L / 8)], one per vector, the first point's in the low 16 bits,
    and "scales" in `scale_dtype`, [*lead, blocks], or [1, .., 1] where `block_size` is "tensor".

    Packed, a row of codes is the first points' 16 bits each (low byte first), then the residuals' 8 or 16 bits each.
    """

    kind = "e8p"
    vector_size: ClassVar[int] = DIMENSION
    trainable_parts: ClassVar[frozenset[str]] = frozenset({"scales"})

    bits: int
    block_size: BlockSize = "tensor"
    opt_scale: float | None = None
    scale_dtype: ScaleDtype = "float32"

    def __post_init__(self) -> None:
        require_range("bits", self.bits, 2, 4, "e8p")
        require_block_size(self.block_size, "e8p")
        if isinstance(self.block_size, int) and self.block_size % DIMENSION:
            raise ValueError(f"block_size {self.block_size} is not a multiple of {DIMENSION} (e8p)")
        require_choice("scale_dtype", self.scale_dtype, list(SCALE_DTYPES), "e8p")
        if self.opt_scale is not None and not 0 < self.opt_scale <= LARGEST_OPT_SCALE:
            raise ValueError(f"opt_scale {self.opt_scale!r} is not above 0 and up to {LARGEST_OPT_SCALE:g} (e8p)")

    @property
    def stream_widths(self) -> dict[str, int]:
        return {"codes": self.bits * DIMENSION}

    def bits_per_value(self, length: int) -> float:
        code_bits = self.bits * DIMENSION * self.code_count(length)
        return (code_bits + self.scale_bits(SCALE_DTYPES[self.scale_dtype].itemsize * 8, length)) / length

    def fit(self, x_Gg: Tensor) -> dict[str, Tensor]:
        """Scales rms / opt_scale, [G] or [1, .., 1]; 0 for zeros, NaN where there is NaN or infinity."""
        opt_scale = OPT_SCALE[self.bits] if self.opt_scale is None else self.opt_scale
        rms_G = root_mean_square(scale_groups(x_Gg, self.block_size))
        return {"scales": storable(rms_G / opt_scale, SCALE_DTYPES[self.scale_dtype], 2 * LARGEST_COORDINATE)}

    def encode(self, x_Gg: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """int64 codes [G, ceil(g / 8)]."""
        scale_Gg = scales["scales"].to(torch.float32).unsqueeze(-1)
        x_Gg = x_Gg / torch.where(scale_Gg == 0, 1.0, scale_Gg)
        if x_Gg.shape[-1] % DIMENSION:
            x_Gg = pad(x_Gg, (0, -x_Gg.shape[-1] % DIMENSION))
        x_V8 = x_Gg.reshape(-1, DIMENSION)
        codes_V = nearest_e8p(x_V8)
        if self.bits > 2:
            residual_V8 = (x_V8 - e8p_points(x_V8.device)[codes_V]) * RESIDUAL_SCALE[self.bits]
            nearest_residual = nearest_e8_one_bit if self.bits == 3 else nearest_e8p
            codes_V |= nearest_residual(residual_V8) << FIRST_BITS
        return codes_V.view(*x_Gg.shape[:-1], x_Gg.shape[-1] // DIMENSION)

    def decode(self, codes_Gg: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """float32 values [G, 8 V] of codes [G, V]."""
        points = e8p_points(codes_Gg.device)
        x_GV8 = points[codes_Gg & FIRST_MASK]
        if self.bits > 2:
            residual_points = e8_one_bit_points(codes_Gg.device) if self.bits == 3 else points
            x_GV8 = x_GV8 + residual_points[codes_Gg >> FIRST_BITS] / RESIDUAL_SCALE[self.bits]
        return x_GV8.flatten(-2).mul_(scales["scales"].to(torch.float32).unsqueeze(-1))

    def pack_parts(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        codes_V = parts["codes"]
        planes = [_to_bytes(codes_V & FIRST_MASK, 2)]
        if self.bits > 2:
            planes.append(_to_bytes(codes_V >> FIRST_BITS, self.bits - 2))
        return {**parts, "codes": torch.cat(planes, dim=-1)}

    def unpack_parts(self, packed: dict[str, Tensor], length: int) -> dict[str, Tensor]:
        count = self.code_count(length)
        packed_P = packed["codes"]
        if packed_P.dtype != torch.uint8:
            raise ValueError(f"packed codes are torch.uint8, found {packed_P.dtype} (e8p)")
        if packed_P.shape[-1] != count * self.bits:
            raise ValueError(
                f"{count} codes of {self.bits * DIMENSION} bits take {count * self.bits} bytes a row,"
                f" found {packed_P.shape[-1]} (e8p)"
            )
        codes_V = _from_bytes(packed_P[..., : 2 * count], 2)
        if self.bits > 2:
            codes_V |= _from_bytes(packed_P[..., 2 * count :], self.bits - 2) << FIRST_BITS
        return {**packed, "codes": codes_V}


def _to_bytes(codes_V: Tensor, width: int) -> Tensor:
    """Little-endian bytes [*lead, V * width] of codes [*lead, V]."""
    bytes_ = [(codes_V >> (8 * i) & 0xFF).to(torch.uint8) for i in range(width)]
    return torch.stack(bytes_, dim=-1).flatten(-2)


def _from_bytes(bytes_P: Tensor, width: int) -> Tensor:
    """int64 codes [*lead, V] of bytes [*lead, V * width]."""
    bytes_VW = bytes_P.unflatten(-1, (-1, width)).to(torch.int64)
    return sum((bytes_VW[..., i] << (8 * i) for i in range(1, width)), start=bytes_VW[..., 0])
