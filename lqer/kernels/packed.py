"""A quantized linear packed for the kernels: its tensors.

Shapes: I in_features, O out_features, R rank; a P after a letter means padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lqer.formats import E8P, Codebook, MXInt, NumberFormat, Passthrough, QuantizedTensor, Trellis
from lqer.kernels.layout.codebook import CodebookLayout, PackedCodebook, check_codebook, pack_codebook
from lqer.kernels.layout.codes import ROW_PADDING, PackedWeight, check_weight_format, pack_weight
from lqer.kernels.layout.groups import GroupLayout, PackedGroups, fits_groups, pack_groups
from lqer.kernels.layout.lattice import LatticeLayout, PackedLattice, check_lattice, pack_lattice
from lqer.kernels.layout.trellis import PackedTrellis, TrellisLayout, pack_trellis
from lqer.kernels.spec import ActivationRounding, AnyLayout, Segment, Spec
from lqer.transforms.hadamard import RandomHadamard

FACTOR_BLOCKS = (16, 32, 64)
DTYPES = (torch.bfloat16, torch.float16)
# The workspace holds the counters of the low-rank branch, then one for every output tile, for up to TOKEN_TILES.
PROJECTION_COUNTERS = 256
TOKEN_TILES = 16

AnyWeight = PackedWeight | PackedGroups | PackedCodebook | PackedLattice | PackedTrellis
# Formats whose kernels rotate x and y, and read A and B as values.
ROTATED = (E8P, Trellis)


@dataclass(frozen=True)
class PackedLinear:
    """A quantized linear as the kernels read it; all tensors contiguous, on one device.

    weight          PackedWeight (layout/codes.py), PackedGroups (layout/groups.py), PackedCodebook
                    (layout/codebook.py), PackedLattice (layout/lattice.py) or PackedTrellis (layout/trellis.py)
    bias_O          [O] in dtype, or None
    a_codes         A transposed [RP, IP]: int8 codes of an MXINT factor, else values in dtype; None at rank 0. Of
                    linears side by side, one below the other
    a_exponents     [RP, IP / a_block] uint8: biased exponents of A's steps, 0 for a block of zeros; None for values
    b_codes         B [RP, O]: as a_codes. Of linears side by side, [own rank, O]
    b_exponents     [RP / b_block, O] uint8: as a_exponents
    workspace       [counters] int32, zero whenever no kernel runs; calls of one layer must not overlap in time
    input_signs_I   [I] in dtype: D(s_u) of the Hadamard rotation that weight and A are in (ROTATED only), or None
    output_signs_O  [O] in dtype: D(s_v) of the rotation of weight and B, or None
    """

    spec: Spec
    dtype: torch.dtype
    weight: AnyWeight
    bias_O: Tensor | None
    a_codes: Tensor | None
    a_exponents: Tensor | None
    b_codes: Tensor | None
    b_exponents: Tensor | None
    workspace: Tensor
    input_signs_I: Tensor | None = None
    output_signs_O: Tensor | None = None

    @classmethod
    def pack(
        cls,
        weight: QuantizedTensor,
        a: QuantizedTensor | None,
        b: QuantizedTensor | None,
        bias_O: Tensor | None,
        activation: NumberFormat | None,
        dtype: torch.dtype,
        hadamard: RandomHadamard | None = None,
    ) -> PackedLinear:
        """Pack a linear for the kernels, on the device of its tensors.

        weight      (O, I) in "mxint", "int", "codebook", "e8p" or "trellis", blocks along I
        a           (I, R) in any format, or None. MXINT with blocks of 16, 32 or 64 along I stays packed, unless its
                    levels are mid-rise. Other formats, and all factors of ROTATED weights, are kept as values in dtype
        b           (R, O): as a, with blocks along R
        bias_O      (O,) of any float dtype, or None
        activation  "mxint" with blocks of 16, 32 or 64, or None
        dtype       bfloat16 or float16, of x and y
        hadamard    the rotation that weight, a and b are in; kernels rotate x and y for ROTATED weights only

        Raises ValueError, with the rule, for anything else.
        """
        if dtype not in DTYPES:
            raise ValueError(f"kernels compute in bfloat16 or float16, found {dtype}")
        rotated = isinstance(weight.format, ROTATED)
        if hadamard is not None and not rotated:
            kinds = " and ".join(f'"{number_format.kind}"' for number_format in ROTATED)
            raise ValueError(f'kernels rotate x and y for weights of kind {kinds} only, found "{weight.format.kind}"')
        packed = _pack_any(weight, dtype)
        rounding = activation_rounding(activation)
        rank = 0 if a is None else padded_rank(a.shape[1], max(rounding.block, _block_of(b)))
        a_codes, a_exponents, a_block = _pack_factor(a, packed.layout.padded_columns, rank, dtype, as_values=rotated)
        a_codes, a_exponents = (part if part is None else part.T.contiguous() for part in (a_codes, a_exponents))
        b_codes, b_exponents, b_block = _pack_factor(b, rank, weight.shape[0], dtype, as_values=rotated)
        return cls(
            spec=Spec(packed.layout, rounding, rank, a_block, b_block),
            dtype=dtype,
            weight=packed,
            bias_O=None if bias_O is None else bias_O.to(dtype),
            a_codes=a_codes,
            a_exponents=a_exponents,
            b_codes=b_codes,
            b_exponents=b_exponents,
            workspace=workspace_of(packed.layout, packed.words.device),
            input_signs_I=None if hadamard is None else hadamard.input_signs_I.to(packed.words.device, dtype),
            output_signs_O=None if hadamard is None else hadamard.output_signs_O.to(packed.words.device, dtype),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are not None, by name: the buffers of TritonLinear."""
        named = dict(zip(("words", "high", "scales", "zeros"), self.weight.parts, strict=True))
        named |= {
            "bias": self.bias_O, "a_codes": self.a_codes, "a_exponents": self.a_exponents, "b_codes": self.b_codes,
            "b_exponents": self.b_exponents, "workspace": self.workspace, "input_signs": self.input_signs_I,
            "output_signs": self.output_signs_O,
        }  # fmt: skip
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def rotation(self) -> RandomHadamard | None:
        """The rotation that weight and factors are in, where kernels or `run_between_rotations` apply it."""
        if self.input_signs_I is None or self.output_signs_O is None:
            return None
        if not self.spec.segments:
            return RandomHadamard(self.input_signs_I, self.output_signs_O)
        return SegmentHadamard(self.input_signs_I, self.output_signs_O, self.spec.segments)


@dataclass(frozen=True, eq=False)
class SegmentHadamard(RandomHadamard):
    """The rotations of linears side by side: of the one input, and of each segment of the outputs by itself."""

    segments: tuple[Segment, ...]

    def output(self, y_TO: Tensor) -> Tensor:
        """The outputs rotated back; zeros between segments."""
        rotated_TO = torch.zeros_like(y_TO)
        for segment in self.segments:
            own = RandomHadamard(self.input_signs_I, self.output_signs_O[segment.rows_of_all])
            rotated_TO[..., segment.rows_of_all] = own.output(y_TO[..., segment.rows_of_all])
        return rotated_TO


def workspace_of(layout: AnyLayout, device: torch.device) -> Tensor:
    """The counters of a linear, zero."""
    tiles = 0 if isinstance(layout, CodebookLayout) else layout.padded_rows // ROW_PADDING
    return torch.zeros(PROJECTION_COUNTERS + TOKEN_TILES * tiles, dtype=torch.int32, device=device)


def weight_of(layout: AnyLayout, words: Tensor, high: Tensor | None, scales: Tensor, zeros: Tensor | None) -> AnyWeight:
    """The packed weight whose `parts` are these tensors; shapes in their modules."""
    if isinstance(layout, CodebookLayout):
        return PackedCodebook(layout, words, scales)
    if isinstance(layout, LatticeLayout):
        assert high is not None
        return PackedLattice(layout, words, high, scales)
    if isinstance(layout, TrellisLayout):
        return PackedTrellis(layout, words, scales)
    if isinstance(layout, GroupLayout):
        return PackedGroups(layout, words, scales, zeros)
    return PackedWeight(layout, words, high, scales, zeros)


def check_weight(number_format: NumberFormat) -> None:
    """Raise ValueError, with the rule, for a weight format that the kernels do not support."""
    if isinstance(number_format, Codebook):
        check_codebook(number_format)
    elif isinstance(number_format, E8P):
        check_lattice(number_format)
    elif not isinstance(number_format, Trellis):
        check_weight_format(number_format)


def activation_rounding(activation: NumberFormat | None) -> ActivationRounding:
    """How kernels round to this format. Raises ValueError for a format that they do not support."""
    if activation is None or isinstance(activation, Passthrough):
        return ActivationRounding()
    if not isinstance(activation, MXInt) or activation.mid_rise:
        raise ValueError(f'kernels round activations to "mxint" with mid-tread levels, found {activation}')
    if activation.block_size not in FACTOR_BLOCKS:
        raise ValueError(f"activation block_size {activation.block_size} is not one of {FACTOR_BLOCKS}")
    return ActivationRounding(activation.bits, activation.block_size, activation.scale_rounding == "ceil")


def padded_rank(rank: int, block: int) -> int:
    """Rank of the kernels, padded with zeros: a power of two of whole blocks up to 64, then a multiple of 64."""
    return max(16, block, 1 << (rank - 1).bit_length()) if rank <= 64 else -(-rank // 64) * 64


def _block_of(factor: QuantizedTensor | None) -> int:
    """Block size of a factor that stays packed; else 0."""
    if factor is None or not isinstance(factor.format, MXInt) or factor.format.mid_rise or factor.axis != 0:
        return 0
    return factor.format.block_size if factor.format.block_size in FACTOR_BLOCKS else 0


def _pack_any(weight: QuantizedTensor, dtype: torch.dtype) -> AnyWeight:
    if isinstance(weight.format, Codebook):
        return pack_codebook(weight, dtype)
    if isinstance(weight.format, Trellis):
        return pack_trellis(weight)
    if fits_groups(weight.format):
        return pack_groups(weight)
    return pack_lattice(weight) if isinstance(weight.format, E8P) else pack_weight(weight)


def _pack_factor(
    factor: QuantizedTensor | None, rows: int, columns: int, dtype: torch.dtype, as_values: bool
) -> tuple[Tensor | None, Tensor | None, int]:
    """Codes or values [rows, columns], step exponents or None, and the block size."""
    if factor is None:
        return None, None, FACTOR_BLOCKS[0]
    number_format, block = factor.format, _block_of(factor)
    if as_values or not block:
        return _padded(factor.dequantize(dtype), rows, columns), None, FACTOR_BLOCKS[0]
    assert isinstance(number_format, MXInt)
    exponents = factor.parts["exponents"].to(torch.int16)
    steps = torch.where(exponents > 0, exponents - number_format.fraction_bits, 0)
    if (steps < 0).any():
        raise ValueError("the step of an MXINT block of a factor is below 2^-126")
    codes = _padded(factor.parts["codes"].T, rows, columns)
    return codes, _padded(steps.to(torch.uint8).T, rows // block, columns), block


def _padded(values: Tensor, rows: int, columns: int) -> Tensor:
    return pad(values, (0, columns - values.shape[1], 0, rows - values.shape[0])).contiguous()
