"""OCP microscaling formats (OCP Microscaling Formats MX v1.0): small floats or INT8 that share an E8M0 scale.

A block with largest magnitude M has the scale X = 2^(floor(log2 M) - emax), emax being the exponent of the element
format's largest value, no smaller than 2^-127 (section 6.3). An element is x / X rounded to the element format
(section 5.3), saturated to its largest value, subnormals kept:

    element      width  fraction bits  emax  largest    smallest normal  smallest subnormal
    mxfp8_e4m3   8      3              8     448        2^-6             2^-9
    mxfp8_e5m2   8      2              15    57344      2^-14            2^-16
    mxfp6_e3m2   6      2              4     28         2^-2             2^-4
    mxfp6_e2m3   6      3              2     7.5        1                2^-3
    mxfp4_e2m1   4      1              2     6          1                2^-1
    mxint8       8      6              0     127/64     -                2^-6

Rounding is half to "even" or half "away" from zero. Since floor(log2 M) <= 127 for float32, no finite block needs the
NaN scale. M is used exactly; an implementation that rounds log2 M to float32 doubles the scale of blocks whose M is
just below a large power of two.

Shapes: L length of the block axis, G blocks of all leading dims, g values of a block, C codes of an element format,
K levels.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from lqer.components import require_choice
from lqer.formats.base import NumberFormat, require_block_size
from lqer.formats.blocks import (
    E8M0_NAN,
    FLOAT32_INF_PATTERN,
    FLOAT32_MANTISSA_BITS,
    BlockSize,
    e8m0_to_float,
    max_magnitude_pattern,
    scale_groups,
)
from lqer.formats.spacing import Levels

FLOAT32_BIAS = 127


@dataclass(frozen=True)
class Element:
    """An element format. Codes are its bit patterns: sign, exponent, fraction; two's complement for INT8."""

    width: int
    exponent_bits: int  # 0: an integer with an implied scale of 2^-fraction_bits
    fraction_bits: int
    emax: int
    largest: float
    specials: tuple[float, ...] = ()  # values of the codes above that of `largest` (OCP 8-bit floats, OFP8 v1.0)

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number."""
        return 2 - (1 << (self.exponent_bits - 1))

    @property
    def max_magnitude_code(self) -> int:
        """Bit pattern of `largest`."""
        return (1 << (self.width - 1)) - 1 - len(self.specials)


ELEMENTS = {
    "mxfp8_e4m3": Element(8, 4, 3, 8, 448.0, (torch.nan,)),
    "mxfp8_e5m2": Element(8, 5, 2, 15, 57344.0, (torch.inf, torch.nan, torch.nan, torch.nan)),
    "mxfp6_e3m2": Element(6, 3, 2, 4, 28.0),
    "mxfp6_e2m3": Element(6, 2, 3, 2, 7.5),
    "mxfp4_e2m1": Element(4, 2, 1, 2, 6.0),
    "mxint8": Element(8, 0, 6, 0, 127 / 64),
}


@dataclass(frozen=True)
class MX(NumberFormat):
    """An OCP MX format; parts: uint8 "codes" [*lead, L] (element bit patterns), uint8 "exponents" [*lead, blocks]."""

    kind = "mx"

    element: Literal["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4_e2m1", "mxint8"]
    block_size: BlockSize = 32
    element_rounding: Literal["even", "away"] = "even"

    def __post_init__(self) -> None:
        require_choice("element", self.element, list(ELEMENTS), "mx")
        require_block_size(self.block_size, "mx")
        require_choice("element_rounding", self.element_rounding, ["even", "away"], "mx")

    @property
    def stream_widths(self) -> dict[str, int]:
        return {"codes": ELEMENTS[self.element].width}

    def bits_per_value(self, length: int) -> float:
        return ELEMENTS[self.element].width + self.scale_bits(8, length) / length

    def fit(self, x_Gg: Tensor) -> dict[str, Tensor]:
        """Scales uint8 [G] (E8M0) of float32 blocks [G, g]."""
        max_G = max_magnitude_pattern(scale_groups(x_Gg, self.block_size))
        exponents_G = ((max_G >> FLOAT32_MANTISSA_BITS) - ELEMENTS[self.element].emax).clamp_(min=0)
        exponents_G.masked_fill_(max_G >= FLOAT32_INF_PATTERN, E8M0_NAN)
        return {"exponents": exponents_G.to(torch.uint8)}

    def encode(self, x_Gg: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """Element bit patterns uint8 [G, g]."""
        element = ELEMENTS[self.element]
        v_Gg = x_Gg / e8m0_to_float(scales["exponents"]).unsqueeze(-1)
        unit_Gg, units_Gg = self._units(v_Gg)
        if element.exponent_bits == 0:
            return units_Gg.to(torch.int8).view(torch.uint8)
        # A magnitude of n units is the pattern n while subnormal; each doubling of the unit adds one to the exponent
        # field. A round-up to the next power of two carries into that field by itself.
        smallest_unit_exponent = element.emin - element.fraction_bits + FLOAT32_BIAS
        doublings_Gg = (unit_Gg.view(torch.int32) >> FLOAT32_MANTISSA_BITS) - smallest_unit_exponent
        magnitude_Gg = units_Gg.abs().to(torch.int32) + (doublings_Gg << element.fraction_bits)
        sign_Gg = units_Gg.signbit().to(torch.int32) << (element.width - 1)
        return (magnitude_Gg.clamp_(max=element.max_magnitude_code) | sign_Gg).to(torch.uint8)

    def decode(self, codes_Gg: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """float32 element * scale [G, g]; NaN where the scale is 255 or the pattern is a NaN."""
        values_C = torch.tensor(_element_values(self.element), dtype=torch.float32, device=codes_Gg.device)
        return values_C[codes_Gg.to(torch.int32)] * e8m0_to_float(scales["exponents"]).unsqueeze(-1)

    def round_blocks(self, x_Gg: Tensor) -> Tensor:
        element = ELEMENTS[self.element]
        scale_Gg = e8m0_to_float(self.fit(x_Gg)["exponents"]).unsqueeze(-1)
        unit_Gg, units_Gg = self._units(x_Gg / scale_Gg)
        return units_Gg.mul_(unit_Gg).clamp_(-element.largest, element.largest).mul_(scale_Gg)

    def _units(self, v_Gg: Tensor) -> tuple[Tensor, Tensor]:
        """The spacing of element values around each scaled value v, and v rounded to a whole number of them.

        Both float32 [G, g], but INT8's spacing is one number for all. A float's is 2^(max(floor(log2 |v|), emin) -
        fraction_bits).
        """
        element = ELEMENTS[self.element]
        if element.exponent_bits == 0:
            unit_Gg = v_Gg.new_full((), 2.0**-element.fraction_bits)
        else:
            power_Gg = (v_Gg.view(torch.int32) & FLOAT32_INF_PATTERN).view(torch.float32)
            unit_Gg = power_Gg.clamp_(min=2.0**element.emin).mul_(2.0**-element.fraction_bits)
        units_Gg = v_Gg / unit_Gg
        if self.element_rounding == "even":
            units_Gg.round_()
        else:
            # In float32 the sum also takes 0.5 - 2^-25 up to 1, as microxcaling's does.
            units_Gg = units_Gg.abs().add_(0.5).floor_().copysign_(units_Gg)
        if element.exponent_bits == 0:
            units_Gg.clamp_(-127, 127)
        return unit_Gg, units_Gg

    def fixed_levels(self, scales: dict[str, Tensor]) -> Levels:
        step_G = e8m0_to_float(scales["exponents"])
        return Levels(step_G, *_tables(replace(self, block_size="row"), step_G.device))


@lru_cache
def _tables(number_format: MX, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, boundaries and codes of an element, float32 and uint8, on a device."""
    one = {"exponents": torch.tensor([FLOAT32_BIAS], dtype=torch.uint8)}
    values_C = torch.tensor(_element_values(number_format.element), dtype=torch.float32)
    values_C = values_C[values_C.isfinite()]
    # The levels that a value can be rounded to, with one zero.
    levels_K = number_format.decode(number_format.encode(values_C.unsqueeze(0), one), one)[0].unique() + 0.0
    codes_K = number_format.encode(levels_K.unsqueeze(0), one)[0]
    middles_K = (levels_K[:-1] + levels_K[1:]) / 2
    # Half-way between two levels, the format says which it is.
    is_higher_K = number_format.decode(number_format.encode(middles_K.unsqueeze(0), one), one)[0] > middles_K
    boundaries_K = torch.where(is_higher_K, middles_K.nextafter(torch.tensor(-torch.inf)), middles_K)
    return levels_K.to(device), boundaries_K.to(device), codes_K.to(device)


@lru_cache
def _element_values(name: str) -> tuple[float, ...]:
    """The values of the 2^width bit patterns of an element."""
    element = ELEMENTS[name]
    if element.exponent_bits == 0:
        return tuple((code - 256 if code > 127 else code) / 64 for code in range(256))
    magnitudes = []
    for code in range(element.max_magnitude_code + 1):
        field, fraction = code >> element.fraction_bits, code & ((1 << element.fraction_bits) - 1)
        hidden = 1 << element.fraction_bits if field else 0
        exponent = element.emin + max(field - 1, 0) - element.fraction_bits
        magnitudes.append((hidden + fraction) * 2.0**exponent)
    magnitudes += element.specials
    return tuple(magnitudes) + tuple(-magnitude for magnitude in magnitudes)
