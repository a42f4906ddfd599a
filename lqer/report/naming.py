"""Names of schemes in tables and figures: the parts they are composed of. And of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lqer.methods import Method

RTN = "RTN"
NEAREST = "nearest"
# Digits of the hash that tells two texts of one name apart.
TEXT_DIGITS = 8


def scheme_name(quantize: Mapping[str, Any]) -> str:
    """Transforms, rounding and method of a resolved [quantize] table; parts that do nothing are omitted."""
    method = quantize["method"]["kind"]
    rounding = quantize.get("rounding", {"kind": NEAREST})["kind"]
    # GPTQ is a method and a rounding.
    named = [] if method in ("none", rounding) else [method]
    return " + ".join([*_shown(quantize, rounding), *named]) or RTN


def rtn_name(quantize: Mapping[str, Any]) -> str:
    """The same without low-rank reconstruction, with the rounding that the method brings if no other is given."""
    return " + ".join(_shown(quantize, own_rounding(quantize))) or RTN


def own_rounding(quantize: Mapping[str, Any]) -> str:
    """The kind of the rounding of a resolved [quantize] table: where none is given, that of the method."""
    if "rounding" in quantize:
        return quantize["rounding"]["kind"]
    # A method of a plug-in that is not loaded has no class.
    method = Method.registry.get(quantize["method"]["kind"])
    own = None if method is None else method.rounding
    return NEAREST if own is None else own.kind


def weights_name(quantize: Mapping[str, Any]) -> str:
    """The format of the weights of a resolved [quantize] table; under a budget those that it is spent on."""
    return quantize["weight"] if quantize.get("budget_bits") is None else ", ".join(quantize["widths"])


def _shown(quantize: Mapping[str, Any], rounding: str) -> list[str]:
    kinds = [*(part["kind"] for part in quantize.get("transforms", ())), rounding]
    return [kind for kind in kinds if kind != NEAREST]
