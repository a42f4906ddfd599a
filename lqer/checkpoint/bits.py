"""Bits per weight, charging everything that must be stored for the quantized linears.

Codes, shared exponents or scales and zero points, codebooks, signs of rotations, A and B in their formats: all as they
are packed, including the padding of a row to whole bytes, divided by the number of original weights. Biases and
unquantized parameters are left out of both numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict


class Bits(TypedDict):
    """Bits per original weight of the quantized linears."""

    average: float  # weight + low_rank + metadata
    weight: float  # codes, or indices into codebooks
    low_rank: float  # A and B, their metadata included
    metadata: float  # exponents, scales, zero points, codebooks of the weights; signs of rotations
    codebook: float  # the part of metadata that is codebooks and their scales


def average_bits(rows: Iterable[Mapping[str, Any]]) -> Bits:
    """Sum the per-linear totals (`weight_bits`, `metadata_bits`, ...) over the number of weights."""
    rows = list(rows)
    weights = sum(row["out_features"] * row["in_features"] for row in rows)
    weight, metadata, low_rank, codebook = (
        sum(row[f"{part}_bits"] for row in rows) / max(weights, 1)
        for part in ("weight", "metadata", "low_rank", "codebook")
    )
    return Bits(
        average=weight + low_rank + metadata, weight=weight, low_rank=low_rank, metadata=metadata, codebook=codebook
    )
