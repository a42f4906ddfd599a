"""Roundings: which of a number format's values each weight takes.

This folder imports torch, lqer.formats and lqer.components only. A new rounding is a file here, imported below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lqer.components import component_from_dict
from lqer.rounding.adaptive import Adaptive
from lqer.rounding.base import Rounding
from lqer.rounding.gptq import Gptq
from lqer.rounding.ldlq import Ldlq
from lqer.rounding.nearest import Nearest
from lqer.rounding.vector import Vector

ROUNDINGS: dict[str, type[Rounding]] = Rounding.registry

__all__ = ["ROUNDINGS", "Adaptive", "Gptq", "Ldlq", "Nearest", "Rounding", "Vector", "rounding_from_dict"]


def rounding_from_dict(settings: Mapping[str, Any]) -> Rounding:
    """The rounding that `Rounding.to_dict` described. Raises ValueError for an unknown kind, key or value."""
    return component_from_dict(Rounding, settings)
