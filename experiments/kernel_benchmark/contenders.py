"""The contenders: our packed linears, cuBLAS, torch's own int4 product, our emulation, and the peers of peers.py.

All contenders of a scene compute with the same weights as far as their formats allow: one random matrix, quantized once
for each number format. cuBLAS gets the matrix in bf16, as the baseline.

Shapes: M rows of x, I in_features, O out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernel_benchmark import peers
from kernel_benchmark.results import Scene
from lqer.formats import E8P, Codebook, Int, MXInt, NumberFormat, QuantizedTensor, Trellis
from lqer.nn.linear import HadamardLinear, QuantizedLinear
from lqer.transforms.hadamard import RandomHadamard, random_hadamard

W4, X8 = MXInt(4), MXInt(8)
VQ2 = Codebook(2, 2, group_size=2048)
FACTOR = MXInt(8)  # of A and B
WEIGHT_SCALE = 0.02
LOW_RANK_NORM = 0.1  # of A B relative to W: about the error of rounding to four bits
TINYGEMM_INNER_K_TILES = 8
OWN_TOLERANCE = 5e-3  # rounding y to bf16 costs 1.7e-3, a differing code of Q(x A) or Q(x A B) a little more
PEER_TOLERANCE = 0.1  # wrong results have an error of about 1; gemlite adds its partial sums in bf16


class Operands:
    """Random operands of one (k, n) on the GPU, from one seed; derived tensors are computed on first use."""

    def __init__(self, k: int, n: int, device: torch.device):
        self.k, self.n = k, n
        self._generator = torch.Generator(device).manual_seed(0)
        self.weight_OI = (self._random(n, k) * WEIGHT_SCALE).to(torch.bfloat16)
        self._quantized: dict[NumberFormat, QuantizedTensor] = {}
        self._factors: dict[int, tuple[QuantizedTensor, QuantizedTensor]] = {}

    def _random(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=self._generator.device, generator=self._generator)

    def input(self, m: int) -> Tensor:
        """x_MI in bf16."""
        return self._random(m, self.k).to(torch.bfloat16)

    def quantized(self, number_format: NumberFormat) -> QuantizedTensor:
        """The weights (O, I) in `number_format`."""
        if number_format not in self._quantized:
            self._quantized[number_format] = number_format.quantize(self.weight_OI)
        return self._quantized[number_format]

    def factors(self, rank: int) -> tuple[QuantizedTensor, QuantizedTensor] | tuple[None, None]:
        """A (I, R) and B (R, O), blocks along their contraction dimensions; None twice for rank 0."""
        if rank == 0:
            return None, None
        if rank not in self._factors:
            a_IR = self._random(self.k, rank) * self.k**-0.5
            b_RO = self._random(rank, self.n) * (LOW_RANK_NORM * WEIGHT_SCALE * (self.k / rank) ** 0.5)
            self._factors[rank] = FACTOR.quantize(a_IR, axis=0), FACTOR.quantize(b_RO, axis=0)
        return self._factors[rank]

    def reference(self, variant: Variant, x_MI: Tensor) -> Tensor:
        """The variant's formula in float64."""
        a_IR, b_RO = (None if part is None else part.dequantize(torch.float64) for part in self.factors(variant.rank))
        if variant.weight is None:
            weight_OI = self.weight_OI.double()
        else:
            weight_OI = self.quantized(variant.weight).dequantize(torch.float64)
        layer = QuantizedLinear(weight_OI, None, a_IR, b_RO, variant.activation)
        hadamard = self.hadamard(variant)
        return layer(x_MI.double()) if hadamard is None else HadamardLinear(layer, hadamard, None)(x_MI.double())

    def hadamard(self, variant: Variant) -> RandomHadamard | None:
        """The rotation of the variant's weight and factors, or None."""
        if not variant.rotated:
            return None
        return random_rotation(self.n, self.k, self.weight_OI.device)


def random_rotation(outputs: int, inputs: int, device: torch.device) -> RandomHadamard:
    signs = random_hadamard(outputs, inputs, seed=0)
    return RandomHadamard(signs.input_signs_I.to(device), signs.output_signs_O.to(device))


@dataclass(frozen=True)
class Contender:
    """State, of which copies are used in turn so that weights are not cached, and how one copy is applied to x_MI."""

    state: Any
    run: Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Variant:
    """The computation of a contender. `make(operands, variant, m)` builds it; ImportError if it is not installed."""

    label: str
    make: Callable[[Operands, Variant, int], Contender]
    weight: NumberFormat | None = None  # None: bf16
    activation: NumberFormat | None = None
    rank: int = 0
    stored_bits: float | None = None  # per weight, if different from the number format's
    rotated: bool = False  # between Hadamard rotations; A and B are then read in bf16
    eager: bool = False  # called from Python instead of a CUDA graph
    tolerance: float = OWN_TOLERANCE

    def weight_bits(self, k: int) -> float:
        if self.stored_bits is not None:
            return self.stored_bits
        return 16.0 if self.weight is None else self.weight.bits_per_value(k)

    @property
    def factor_bits(self) -> float:
        return 16.0 if self.rotated else FACTOR.bits_per_value(self.rank)

    def weight_bytes(self, k: int, n: int) -> float:
        """Stored bytes: weights, scales and both factors."""
        branch_bits = self.rank * (k + n) * self.factor_bits if self.rank else 0.0
        return (k * n * self.weight_bits(k) + branch_bits) / 8

    def floor_us(self, scene: Scene, bytes_per_second: float, operations_per_second: float) -> float:
        """Lower bound of a call: weights and x read once, y written once, at these rates."""
        k, n, m = scene
        bytes_moved = self.weight_bytes(k, n) + 2 * m * (k + n)
        operations = 2 * m * (k * n + self.rank * (k + n))
        return 1e6 * max(bytes_moved / bytes_per_second, operations / operations_per_second)


def cublas(operands: Operands, variant: Variant, m: int) -> Contender:
    return Contender(operands.weight_OI, lambda weight_OI, x_MI: F.linear(x_MI, weight_OI))


def _pack(operands: Operands, variant: Variant, rank: int) -> Any:
    # Imported here, so that kernels that cannot be imported are rows with an error instead of no table.
    from lqer.kernels import PackedLinear

    assert variant.weight is not None
    a_IR, b_RO = operands.factors(rank)
    weight = operands.quantized(variant.weight)
    hadamard = operands.hadamard(variant)
    return PackedLinear.pack(weight, a_IR, b_RO, None, variant.activation, torch.bfloat16, hadamard)


def packed(operands: Operands, variant: Variant, m: int) -> Contender:
    """Our kernels."""
    from lqer.kernels import packed_linear

    return Contender(_pack(operands, variant, variant.rank), lambda state, x_MI: packed_linear(x_MI, state))


def unfused(operands: Operands, variant: Variant, m: int) -> Contender:
    """Our product without a low-rank branch, and the branch as two separate bf16 products."""
    from lqer.kernels import packed_linear

    factors = (part.dequantize(torch.bfloat16) for part in operands.factors(variant.rank) if part is not None)

    def run(state: Any, x_MI: Tensor) -> Tensor:
        product, a_IR, b_RO = state
        return packed_linear(x_MI, product).addmm_(x_MI @ a_IR, b_RO)

    return Contender((_pack(operands, variant, 0), *factors), run)


def emulation(operands: Operands, variant: Variant, m: int) -> Contender:
    """lqer.nn.linear.QuantizedLinear in bf16."""
    assert variant.weight is not None
    a_IR, b_RO = (None if part is None else part.dequantize(torch.bfloat16) for part in operands.factors(variant.rank))
    weight_OI = operands.quantized(variant.weight).dequantize(torch.bfloat16)
    layer = QuantizedLinear(weight_OI, None, a_IR, b_RO, variant.activation)
    return Contender(layer, lambda layer, x_MI: layer(x_MI))


def tinygemm(operands: Operands, variant: Variant, m: int) -> Contender:
    """aten::_weight_int4pack_mm: (code - 8) * scale + zero in groups along I, two codes per byte, the even one high."""
    assert variant.weight is not None
    codes_OI, scales_OG = peers.offset_codes_and_scales(operands.quantized(variant.weight))
    bytes_OP = codes_OI[:, ::2] << 4 | codes_OI[:, 1::2]
    weight = torch.ops.aten._convert_weight_to_int4pack(bytes_OP, TINYGEMM_INNER_K_TILES)
    scales_and_zeros_GO2 = torch.stack([scales_OG, torch.zeros_like(scales_OG)], -1).transpose(0, 1).contiguous()
    group = variant.weight.block_size

    def run(state: tuple[Tensor, Tensor], x_MI: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x_MI, state[0], group, state[1])

    return Contender((weight, scales_and_zeros_GO2), run)


def humming(operands: Operands, variant: Variant, m: int) -> Contender:
    assert variant.weight is not None
    return Contender(*peers.humming_int4(operands.quantized(variant.weight), m))


def gemlite(operands: Operands, variant: Variant, m: int) -> Contender:
    assert variant.weight is not None
    return Contender(*peers.gemlite_int4(operands.quantized(variant.weight)))


def _own(label: str, weight: NumberFormat, activation: NumberFormat | None = None, rank: int = 0) -> Variant:
    return Variant(label, packed, weight, activation, rank)


def _rotated(label: str, weight: NumberFormat, rank: int = 64) -> Variant:
    branch = f" + rank {rank}" if rank else ""
    return Variant(f"{label}{branch}, rotated", packed, weight, rank=rank, rotated=True)


_LAYER = "W4A8 + rank 32"
VARIANTS = {
    "bf16": Variant("cuBLAS bf16", cublas),
    "humming-int4-g16": Variant("humming int4 g16", humming, W4, tolerance=PEER_TOLERANCE),
    "gemlite-int4-g16": Variant("gemlite int4 g16", gemlite, W4, stored_bits=5.0, tolerance=PEER_TOLERANCE),
    "gemlite-int4-g32": Variant("gemlite int4 g32", gemlite, MXInt(4, 32), stored_bits=4.5, tolerance=PEER_TOLERANCE),
    "tinygemm-int4-g32": Variant(
        "tinygemm int4 g32", tinygemm, MXInt(4, 32), stored_bits=5.0, tolerance=PEER_TOLERANCE
    ),
    "w2a16": _own("W2A16", MXInt(2)),
    "w3a16": _own("W3A16", MXInt(3)),
    "w4a16": _own("W4A16", W4),
    "w8a16": _own("W8A16", MXInt(8)),
    "int4-g128-a16": _own("INT4 g128 asymmetric, A16", Int(4, 128)),
    "int3-g128-a16": _own("INT3 g128 asymmetric, A16", Int(3, 128)),
    "int2-g64-a16": _own("INT2 g64 asymmetric, A16", Int(2, 64)),
    "vq2-1d": _own("2-bit 1D codebook", Codebook(2, 1, group_size=256)),
    "vq2-2d": _own("2-bit 2D codebook", VQ2),
    "vq2-4d": _own("2-bit 4D codebook", Codebook(2, 4, group_size=65536)),
    "vq2-2d-r32": _own("2-bit 2D codebook + rank 32", VQ2, rank=32),
    "w4a8": _own("W4A8", W4, X8),
    "w4a16-r32": _own("W4A16 + rank 32", W4, rank=32),
    "w4a16-r32-unfused": Variant("W4A16 + rank 32, unfused", unfused, W4, rank=32),
    **{f"w4a8-r{rank}": _own(f"W4A8 + rank {rank}", W4, X8, rank) for rank in (16, 32, 64, 128, 256)},
    "e8p-r64": _rotated("2-bit E8P", E8P(2)),
    **{f"trellis{bits}-r64": _rotated(f"{bits}-bit trellis", Trellis(bits)) for bits in (2, 3, 4)},
    **{
        f"bytes{bits}{suffix}": _rotated(f"{bits}-bit trellis, byte sums", Trellis(bits, table="bytes"), rank)
        for bits in (2, 3, 4)
        for suffix, rank in (("", 0), ("-r64", 64))
    },
    "w4a8-r32-eager": Variant(f"{_LAYER}, from Python", packed, W4, X8, 32, eager=True),
    "emulation-w4a8-r32": Variant(
        f"emulation of {_LAYER}, from Python", emulation, W4, X8, 32, 16.0, eager=True
    ),
}  # fmt: skip
LABELS = {name: variant.label for name, variant in VARIANTS.items()}
