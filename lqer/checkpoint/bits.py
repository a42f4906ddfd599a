"""Bits per weight, charging everything that must be stored for the quantized linears.

Codes, shared exponents or scales and zero points, codebooks, signs of rotations, A and B in their formats: all as they
are packed, including the padding of a row to whole bytes, divided by the number of original weights. Biases and
unquantized parameters are left out of both numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

# Totals in a linear's row are named after them.
PARTS = ("weight", "metadata", "low_rank", "codebook", "zero", "sign")
# Differences of sums leave less than this where there is nothing.
LEAST_SHOWN = 1e-9


class Bits(TypedDict):
    """Bits per original weight of the quantized linears."""

    average: float  # weight + low_rank + metadata
    weight: float  # codes, or indices into codebooks
    low_rank: float  # A and B, their metadata included
    metadata: float  # exponents, scales, zero points, codebooks of the weights; signs of rotations
    codebook: float  # the part of metadata that is codebooks and their scales
    zeros: float  # the part of metadata that is zero points
    signs: float  # the part of metadata that is signs of rotations


def average_bits(rows: Iterable[Mapping[str, Any]]) -> Bits:
    """Sum the per-linear totals (`weight_bits`, `metadata_bits`, ...) over the number of weights."""
    rows = list(rows)
    weights = sum(row["out_features"] * row["in_features"] for row in rows)
    parts = {part: sum(row[f"{part}_bits"] for row in rows) / max(weights, 1) for part in PARTS}
    return Bits(
        average=parts["weight"] + parts["low_rank"] + parts["metadata"],
        weight=parts["weight"],
        low_rank=parts["low_rank"],
        metadata=parts["metadata"],
        codebook=parts["codebook"],
        zeros=parts["zero"],
        signs=parts["sign"],
    )


def named_parts(bits: Mapping[str, Any]) -> dict[str, float]:
    """The parts of `average` by name, which add up to it; those of nothing are left out, but the codes.

    bits: `Bits`, or those of a run made before zero points and signs were told apart.
    """
    zeros, signs = bits.get("zeros"), bits.get("signs")
    codebook = bits.get("codebook", 0.0)
    scales = "scales, zeros and signs" if zeros is None else "scales"
    parts = {
        "indices" if codebook else "codes": bits["weight"],
        "codebooks": codebook,
        scales: bits["metadata"] - codebook - (zeros or 0.0) - (signs or 0.0),
        "zeros": zeros or 0.0,
        "signs": signs or 0.0,
        "A and B": bits["low_rank"],
    }
    return {name: value for name, value in parts.items() if value > LEAST_SHOWN or name in ("codes", "indices")}
