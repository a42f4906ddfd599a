"""Transforms as a configuration names them: which can follow one another, and how they are written down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import tomli
import tomli_w

from lqer.transforms import TRANSFORMS, Hadamard, Transform, transform_from_dict, unsupported_order
from lqer.transforms.base import Level


@dataclass(frozen=True)
class OfAModel(Transform):
    level: ClassVar[Level] = "model"
    kind = "of-a-model"


@dataclass(frozen=True)
class OfABlock(Transform):
    level: ClassVar[Level] = "block"
    kind = "of-a-block"


@dataclass(frozen=True)
class AnotherRotation(Transform):
    level: ClassVar[Level] = "linear"
    kind = "another-rotation"


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_a_transform_survives_being_written_down(kind):
    transform = transform_from_dict({"kind": kind})
    assert transform_from_dict(tomli.loads(tomli_w.dumps(transform.to_dict()))) == transform


def test_the_wider_level_comes_first():
    assert unsupported_order([]) is None
    assert unsupported_order([OfAModel(), Hadamard()]) is None
    assert unsupported_order([OfAModel(), OfABlock()]) is None
    assert unsupported_order([Hadamard(), OfABlock()]) == (
        '"of-a-block" (block) must come before "hadamard" (linear): the order is model, block, linear'
    )


def test_a_transform_is_named_once_and_a_linear_has_one_rotation():
    assert unsupported_order([OfABlock(), OfABlock()]) == '"of-a-block" is named twice'
    assert (
        unsupported_order([Hadamard(), AnotherRotation()])
        == "a linear has one rotation, not 2: hadamard, another-rotation"
    )
