"""Families of schemes: one colour and one marker each, the same in every figure and on the page.

The colours stay apart for colour-blind readers, on white and on dark ground; the markers tell the families apart in
print.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lqer.report.naming import own_rounding


@dataclass(frozen=True)
class Family:
    """marker: of matplotlib; symbol: the same of plotly."""

    name: str
    colour: str
    marker: str
    symbol: str


RTN = Family("round to nearest", "#D55E00", "s", "square")
LOW_RANK = Family("low-rank factors", "#0072B2", "o", "circle")
FEEDBACK = Family("error feedback", "#009E73", "^", "triangle-up")
SCALING = Family("scaling and clipping", "#D688BE", "v", "triangle-down")
LEARNED = Family("learned rounding", "#9430E8", "D", "diamond")
CODEBOOK = Family("learned codebooks", "#CFA63F", "P", "cross")
LATTICE = Family("lattice and trellis codes", "#36B0F0", "X", "x")
OTHER = Family("other", "#8A8A8A", "*", "star")
# In the order of legends.
FAMILIES = (RTN, LOW_RANK, FEEDBACK, SCALING, LEARNED, CODEBOOK, LATTICE, OTHER)

OF_FORMATS = {"e8p": LATTICE, "trellis": LATTICE, "codebook": CODEBOOK}
# The first that a scheme has decides.
OF_PARTS = {
    "vector": CODEBOOK, "adaptive": LEARNED, "gptq": FEEDBACK, "ldlq": FEEDBACK, "awq": SCALING, "clip": SCALING,
    "lwc": SCALING,
}  # fmt: skip


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a resolved configuration."""
    quantize, without = config["quantize"], rtn_family(config)
    low_rank = quantize.get("low_rank", {})
    has_factors = quantize["method"]["kind"] != "none" and bool(low_rank.get("rank") or low_rank.get("budget_bits"))
    return LOW_RANK if without is RTN and has_factors else without


def rtn_family(config: Mapping[str, Any]) -> Family:
    """The family of the same formats, rounding and transforms without low-rank factors."""
    quantize = config["quantize"]
    number_format = config.get("formats", {}).get(quantize["weight"], {}).get("kind")
    if number_format in OF_FORMATS:
        return OF_FORMATS[number_format]
    rounding = own_rounding(quantize)
    kinds = {rounding, *(part["kind"] for part in quantize.get("transforms", ()))}
    for kind, family in OF_PARTS.items():
        if kind in kinds:
            return family
    return RTN if rounding == "nearest" else OTHER
