"""Transforms: rotations, scales and clipped ranges that are applied to weights before rounding.

This folder imports torch, lqer.components and the formats, statistics and roundings only. A new transform is a file
here, imported below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lqer.components import component_from_dict
from lqer.transforms.awq import Awq
from lqer.transforms.balance import Balance
from lqer.transforms.base import LinearTransform, Rotation, Scheme, Transform, unsupported_order
from lqer.transforms.block_transform import BlockTransform
from lqer.transforms.clip import Clip
from lqer.transforms.gptq import GptqStart
from lqer.transforms.hadamard import Hadamard
from lqer.transforms.lwc import Lwc
from lqer.transforms.quarot import Quarot
from lqer.transforms.sort import Sort

TRANSFORMS: dict[str, type[Transform]] = Transform.registry

__all__ = [
    "TRANSFORMS",
    "Awq",
    "Balance",
    "BlockTransform",
    "Clip",
    "GptqStart",
    "Hadamard",
    "LinearTransform",
    "Lwc",
    "Quarot",
    "Rotation",
    "Scheme",
    "Sort",
    "Transform",
    "transform_from_dict",
    "unsupported_order",
]


def transform_from_dict(settings: Mapping[str, Any]) -> Transform:
    """The transform that `Transform.to_dict` described. Raises ValueError for an unknown kind, key or value."""
    return component_from_dict(Transform, settings)
