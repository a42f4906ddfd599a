"""What a transform is: a change of basis, scale or range that a weight is rounded in.

A transform is functions on tensors in a file of its own, and a frozen dataclass deriving from `Transform` that carries
its settings into them. The dataclass is what a configuration's `quantize.transforms` names: `"hadamard"`, or
`{ kind = "hadamard" }` with settings beside the kind. It works at one of three levels:

    model     the whole model, before anything else                        functions of the model do not change
    block     the linears and norms of one decoder block together          with the inputs that reach the block
    linear    one linear: its weight is rounded in another basis, and the layer goes there and back

In a list of transforms the wider level comes first, as it is applied.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from lqer.formats import NumberFormat
from lqer.named import Named

Level = Literal["model", "block", "linear"]
LEVELS: tuple[Level, ...] = ("model", "block", "linear")


@dataclass(frozen=True)
class Scheme:
    """What else a configuration asks of a linear: the formats of its weight and input (None: the model's dtype).

    statistics: what its method and its rounding know of the inputs, by the names of lqer/calibration.py.
    """

    weight: NumberFormat
    activation: NumberFormat | None
    statistics: frozenset[str]


class Transform(Named):
    """Settings of one transform."""

    level: ClassVar[Level]

    def objection(self, scheme: Scheme) -> str | None:
        """Why such a linear cannot be transformed this way, as a rule to show to a user; None where it can."""
        return None


def order_objection(transforms: Sequence[Transform]) -> str | None:
    """Why these transforms cannot follow one another; None where they can."""
    kinds = [transform.kind for transform in transforms]
    for earlier, later in itertools.pairwise(transforms):
        if LEVELS.index(earlier.level) > LEVELS.index(later.level):
            return (
                f'"{later.kind}" ({later.level}) must come before "{earlier.kind}" ({earlier.level}): '
                f"the order is {', '.join(LEVELS)}"
            )
    twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
    if twice is not None:
        return f'"{twice}" is named twice'
    linear = [transform.kind for transform in transforms if transform.level == "linear"]
    if len(linear) > 1:
        return f"a linear has one basis, not {len(linear)}: {', '.join(linear)}"
    return None
