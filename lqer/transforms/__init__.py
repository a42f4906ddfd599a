"""In which basis, scale or range a weight is rounded.

This folder imports torch, lqer.formats and lqer.named only. A new transform is a file here and its class in
`TRANSFORMS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lqer.named import named_from_dict
from lqer.transforms.awq import Awq
from lqer.transforms.base import Basis, LinearTransform, Scheme, Transform, order_objection
from lqer.transforms.block_problem import BlockTransform
from lqer.transforms.clip import Clip
from lqer.transforms.hadamard import Hadamard
from lqer.transforms.lwc import Lwc
from lqer.transforms.quarot import Quarot

TRANSFORMS: dict[str, type[Transform]] = {cls.kind: cls for cls in (Quarot, Awq, Clip, Lwc, Hadamard)}

__all__ = [
    "TRANSFORMS",
    "Awq",
    "Basis",
    "BlockTransform",
    "Clip",
    "Hadamard",
    "LinearTransform",
    "Lwc",
    "Quarot",
    "Scheme",
    "Transform",
    "order_objection",
    "transform_from_dict",
]


def transform_from_dict(settings: Mapping[str, Any]) -> Transform:
    """The transform that `Transform.to_dict` described. Raises ValueError for an unknown kind, key or value."""
    return named_from_dict("transform", TRANSFORMS, settings)
