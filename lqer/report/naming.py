"""Names of schemes in tables and figures: the parts they are composed of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RTN = "RTN"


def scheme_name(quantize: Mapping[str, Any]) -> str:
    """Transforms, rounding and method of a resolved [quantize] table; parts that do nothing are omitted."""
    method = quantize["method"]["kind"]
    return " + ".join([*_rounded_by(quantize), *([] if method == "none" else [method])]) or RTN


def rtn_name(quantize: Mapping[str, Any]) -> str:
    """The same without low-rank reconstruction."""
    return " + ".join(_rounded_by(quantize)) or RTN


def _rounded_by(quantize: Mapping[str, Any]) -> list[str]:
    kinds = [part["kind"] for part in (*quantize.get("transforms", ()), quantize.get("rounding", {"kind": "nearest"}))]
    return [kind for kind in kinds if kind != "nearest"]
