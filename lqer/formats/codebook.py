"""Learned codebooks: D neighbours share one index into a small table, the format of GPTVQ (arXiv 2402.15319).

A group of `group_size` weights, about `block_size` columns by group_size / block_size rows, has a codebook of its own:
K = 2^(bits * D) centroids of D elements, stored as int8 under one bfloat16 scale. Options:

    scale_block_size   32 or 64 neighbours of a row share a scale, by which they are divided before the codebook is
                       applied: 2^(offset + step * code), a 4-bit code per block, offset and step per block of columns
    codebook_rank      D = 1: the sorted codebooks of the tensor, stacked to a matrix [groups, K], are a product of
                       that rank; stored are int8 factors per group and one float32 basis

`fit`, `encode` and `decode` see a group as a block: G groups of g elements, vectors of D consecutive elements, and one
code per vector. Which codebook and which codes are good depends on the inputs of a layer, so they are best made by
`lqer.rounding.vector`; `quantize` is k-means on the values alone.

Shapes: L length of the block axis, R rows (all leading dims), G groups, g elements of a group, V vectors, K centroids,
D elements of a vector, S blocks of columns that share the scale's offset and step, r codebook_rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lqer.components import require_choice, require_range
from lqer.formats.base import NumberFormat
from lqer.formats.blocks import block_count
from lqer.formats.groups import Layout
from lqer.formats.kmeans import fit_centroids, nearest_centroids
from lqer.formats.logscale import SCALE_CODE_BITS, decode_log_scales, fit_log_scales

CODEBOOK_BITS = 8  # of a stored centroid's elements, or of a factor
LARGEST_CENTROID_CODE = 127
CODEBOOK_SCALE = torch.bfloat16  # float16 would run out of range for small weights


@dataclass(frozen=True)
class Codebook(NumberFormat):
    """Vector quantization with learned codebooks.

    Parts: uint8 "codes" [*lead, L / D], one per vector, stored in bits * D bits each, and

    - int8 "codebooks" [row groups, column groups, K, D] and bfloat16 "codebook_scales" [row groups, column groups], or,
      with `codebook_rank` r, int8 "codebooks" [.., r], the same scales, and float32 "codebook_basis" [r, K];
    - with `scale_block_size`, uint8 "scale_codes" [*lead, S], stored in 4 bits each, and float16 "scale_offsets" and
      "scale_steps" [S].

    The axis must be a multiple of `dimension`. A tensor without leading dims has one row.
    """

    kind = "codebook"
    codebook_parts: ClassVar[frozenset[str]] = frozenset({"codebooks", "codebook_scales", "codebook_basis"})
    trainable_parts: ClassVar[frozenset[str]] = frozenset({"codebook_scales"})

    bits: int
    dimension: Literal[1, 2, 4] = 2
    group_size: int = 2048
    block_size: int = 256
    scale_block_size: Literal[0, 32, 64] = 0
    codebook_rank: int = 0

    def __post_init__(self) -> None:
        require_choice("dimension", self.dimension, [1, 2, 4], "codebook")
        require_range("bits", self.bits, 1, 8, "codebook")
        if self.index_bits > 8:
            wide = f"bits {self.bits} * dimension {self.dimension} makes indices of {self.index_bits} bits"
            size = self.centroids * self.dimension
            raise ValueError(
                f"{wide}, above 8: a codebook would hold {self.centroids} centroids, {size} bytes (codebook)"
            )
        for field in ("group_size", "block_size"):
            require_range(field, getattr(self, field), self.dimension, 1 << 31, "codebook")
        if self.block_size % self.dimension:
            raise ValueError(f"block_size {self.block_size} is not a multiple of dimension {self.dimension} (codebook)")
        if self.group_size % self.block_size and self.block_size % self.group_size:
            raise ValueError(
                f"group_size {self.group_size} is neither a multiple nor a divisor of block_size {self.block_size}"
                " (codebook)"
            )
        require_choice("scale_block_size", self.scale_block_size, [0, 32, 64], "codebook")
        require_range("codebook_rank", self.codebook_rank, 0, self.centroids - 1, "codebook")
        if self.codebook_rank and self.dimension > 1:
            raise ValueError(f"codebook_rank {self.codebook_rank} needs dimension 1, found {self.dimension} (codebook)")

    @property
    def index_bits(self) -> int:
        """Bits of an index, which codes `dimension` values."""
        return self.bits * self.dimension

    @property
    def centroids(self) -> int:
        """K, of one codebook."""
        return 1 << self.index_bits

    @property
    def stream_widths(self) -> dict[str, int]:
        return {"codes": self.index_bits} | ({"scale_codes": SCALE_CODE_BITS} if self.scale_block_size else {})

    def stream_length(self, name: str, length: int) -> int:
        return length // self.dimension if name == "codes" else block_count(length, self.scale_block_size)

    def bits_per_value(self, length: int) -> float:
        """Index, codebook and block scales of an axis of `length`, where groups are not cut short by the last row.

        What a tensor has once (a codebook's basis, offset and step of each block of columns) is left out.
        """
        layout = self.layout(1 << 40, length)
        stored = self.codebook_rank or self.centroids * self.dimension
        codebook_bits = stored * CODEBOOK_BITS + CODEBOOK_SCALE.itemsize * 8
        scale_bits = SCALE_CODE_BITS * block_count(length, self.scale_block_size) if self.scale_block_size else 0
        return self.bits + (layout.column_groups * codebook_bits / layout.group_rows + scale_bits) / length

    def trainable_values(self, rows: int, length: int) -> int:
        layout = self.layout(rows, length)
        return layout.row_groups * layout.column_groups

    def layout(self, rows: int, length: int) -> Layout:
        """How a matrix is cut into groups of about `group_size` weights.

        Where `block_size` divides the columns this is GPTVQ's rule, block_size columns by group_size / block_size rows.
        Elsewhere columns are cut evenly into pieces of about that many, and rows follow so that a codebook still serves
        about group_size weights: a last piece of a few columns would pay for a whole codebook.
        """
        if length % self.dimension:
            raise ValueError(f"an axis of {length} is not a multiple of dimension {self.dimension} (codebook)")
        if not rows:
            raise ValueError("a tensor without rows has no codebooks (codebook)")
        wanted_columns = min(self.block_size, self.group_size)
        align = max(self.dimension, self.scale_block_size)
        pieces = max(1, round(length / wanted_columns))
        columns = -(-length // (pieces * align)) * align
        mean_columns = length / block_count(length, columns)
        wanted_rows = max(1, round(self.group_size / mean_columns))
        group_rows = -(-rows // -(-rows // wanted_rows))
        return Layout(rows, length, group_rows, columns)

    def fit(self, x_Gg: Tensor, weight_Gg: Tensor | None = None) -> dict[str, Tensor]:
        """Codebooks of float32 groups [G, g] by k-means, each weight counting `weight_Gg` times (0: not there)."""
        weight_Gg = torch.ones_like(x_Gg) if weight_Gg is None else weight_Gg
        return self.encode_centroids(fit_centroids(self._vectors(x_Gg), self._vectors(weight_Gg), self.centroids))

    def encode(self, x_Gg: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """uint8 codes [G, g / D] of the nearest centroids."""
        x_GVD = self._vectors(x_Gg)
        return nearest_centroids(x_GVD, torch.ones_like(x_GVD), self.decode_centroids(scales))

    def decode(self, codes_Gg: Tensor, scales: dict[str, Tensor]) -> Tensor:
        """float32 values [G, g] of codes [G, g / D]."""
        index_GVD = codes_Gg.to(torch.int64).unsqueeze(-1).expand(-1, -1, self.dimension)
        return self.decode_centroids(scales).gather(1, index_GVD).flatten(1)

    def fake_quantize(self, x: Tensor, axis: int = -1) -> Tensor:
        """`quantize(x, axis).dequantize(x.dtype)`: fits codebooks, so nothing for activations; refuses NaN."""
        return self.quantize(x, axis).dequantize(x.dtype)

    def quantize_parts(self, x_L: Tensor) -> dict[str, Tensor]:
        x_RL = x_L.reshape(-1, x_L.shape[-1])
        layout = self.layout(*x_RL.shape)
        scales = self.fit_scales(x_RL)
        scale_RL = self.decode_scales(scales, x_RL)
        x_Gg = layout.group(x_RL / scale_RL)
        codebooks = self.fit(x_Gg, layout.group((scale_RL / scale_RL.amax()).square()))
        codes_RV = layout.ungroup(self.encode(x_Gg, codebooks), x_RL.shape[1] // self.dimension)
        return self.shape_parts(layout, codes_RV, codebooks, scales, x_L.shape[:-1])

    def dequantize_parts(self, parts: dict[str, Tensor]) -> Tensor:
        codes_RV = parts["codes"].reshape(-1, parts["codes"].shape[-1])
        rows, vectors = codes_RV.shape
        layout = self.layout(rows, vectors * self.dimension)
        codes_GV = layout.group(codes_RV, layout.group_columns // self.dimension)
        flat = {name: parts[name].flatten(0, 1) for name in ("codebooks", "codebook_scales")}
        values_RL = layout.ungroup(self.decode(codes_GV, parts | flat))
        values_RL = values_RL * self.decode_scales(parts, values_RL)
        return values_RL.reshape(*parts["codes"].shape[:-1], -1)

    def shape_parts(
        self,
        layout: Layout,
        codes_RV: Tensor,
        codebooks: dict[str, Tensor],
        scales: dict[str, Tensor],
        lead: tuple[int, ...] | torch.Size,
    ) -> dict[str, Tensor]:
        """The parts of a QuantizedTensor from codes [R, V], codebooks of G groups and block scales of R rows."""
        parts = {"codes": codes_RV.reshape(*lead, -1), **codebooks}
        for name in ("codebooks", "codebook_scales"):
            parts[name] = codebooks[name].unflatten(0, (layout.row_groups, layout.column_groups)).contiguous()
        if scales:
            parts |= scales | {"scale_codes": scales["scale_codes"].reshape(*lead, -1)}
        return parts

    def encode_centroids(self, centroids_GKD: Tensor, basis_rK: Tensor | None = None) -> dict[str, Tensor]:
        """Codebooks of G groups as they are stored.

        With `codebook_rank`, sorted centroids lie near a low rank; they are projected onto `basis_rK`, whose rows are
        orthogonal, or onto the best basis for them.
        """
        if not self.codebook_rank:
            return _encode_int8(centroids_GKD)
        centroids_GK = centroids_GKD.squeeze(-1)
        if basis_rK is None:
            return self.encode_factors(*factorize(centroids_GK, self.codebook_rank))
        norm_r = basis_rK.square().sum(1)
        return self.encode_factors(centroids_GK @ basis_rK.T / norm_r.where(norm_r > 0, 1.0), basis_rK)

    def encode_factors(self, factors_Gr: Tensor, basis_rK: Tensor) -> dict[str, Tensor]:
        """Codebooks of G groups as they are stored, from float32 factors and the basis they share."""
        return _encode_int8(factors_Gr) | {"codebook_basis": basis_rK}

    def decode_centroids(self, codebooks: dict[str, Tensor]) -> Tensor:
        """float32 centroids [..., K, D] of codebooks with any leading dims."""
        scale = codebooks["codebook_scales"].to(torch.float32)
        stored = codebooks["codebooks"].to(torch.float32)
        stored = stored * scale[(..., *[None] * (stored.dim() - scale.dim()))]
        return (stored @ codebooks["codebook_basis"]).unsqueeze(-1) if self.codebook_rank else stored

    def fit_scales(self, x_RL: Tensor) -> dict[str, Tensor]:
        """Block scales of a float32 matrix, or nothing where the format has none."""
        return fit_log_scales(x_RL, self.scale_block_size) if self.scale_block_size else {}

    def decode_scales(self, scales: dict[str, Tensor], like_RL: Tensor) -> Tensor:
        """float32 scale of each element of a matrix; ones where the format has no block scales."""
        if not self.scale_block_size:
            return torch.ones_like(like_RL)
        return decode_log_scales(scales, like_RL.shape[0], like_RL.shape[1], self.scale_block_size)

    def _vectors(self, x_Gg: Tensor) -> Tensor:
        return x_Gg.unflatten(-1, (-1, self.dimension))


def factorize(centroids_GK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """float32 factors [G, rank] and basis [rank, K] whose product is the best approximation of that rank.

    The factors' columns have mean square 1, so that rounding them under one scale costs every direction in proportion.
    """
    u_Gr, sigma_r, v_rK = torch.linalg.svd(centroids_GK.to(torch.float64), full_matrices=False)
    missing = max(0, rank - len(sigma_r))  # fewer groups than the rank
    norm = len(centroids_GK) ** 0.5
    factors_Gr = pad(u_Gr[:, :rank] * norm, (0, missing))
    basis_rK = pad(sigma_r[:rank, None] * v_rK[:rank] / norm, (0, 0, 0, missing))
    return factors_Gr.to(torch.float32).contiguous(), basis_rK.to(torch.float32).contiguous()


def _encode_int8(values: Tensor) -> dict[str, Tensor]:
    """Symmetric int8 with a scale per leading element, made for the scale as it is stored; zeros stay zeros."""
    largest_G = values.abs().flatten(1).amax(1)
    scale_G = (largest_G / LARGEST_CENTROID_CODE).to(CODEBOOK_SCALE)
    divisor_G = scale_G.to(torch.float32).where(scale_G > 0, 1.0)
    codes = values / divisor_G.reshape(-1, *[1] * (values.dim() - 1))
    codes = codes.round_().clamp_(-LARGEST_CENTROID_CODE, LARGEST_CENTROID_CODE).to(torch.int8)
    return {"codebooks": codes, "codebook_scales": scale_G}
