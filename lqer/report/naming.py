"""What a scheme is called where it stands beside others: by the parts that it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PLAIN = "plain rounding"


def scheme_name(quantize: Mapping[str, Any]) -> str:
    """Transforms, rounding and method of a resolved [quantize] table, what adds nothing left out."""
    method = quantize["method"]
    return " + ".join([*_rounded_by(quantize), *([] if method == "none" else [method])]) or PLAIN


def plain_name(quantize: Mapping[str, Any]) -> str:
    """The same without reconstruction."""
    return " + ".join(_rounded_by(quantize)) or PLAIN


def _rounded_by(quantize: Mapping[str, Any]) -> list[str]:
    kinds = [part["kind"] for part in (*quantize.get("transforms", ()), quantize.get("rounding", {"kind": "nearest"}))]
    return [kind for kind in kinds if kind != "nearest"]
