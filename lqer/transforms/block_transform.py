"""Transforms of one decoder block: all of its linears and norms together, given the hidden states that reach it.

Such a transform changes parameters without changing the block's function (scales folded into neighbouring modules), or
fixes the scales that weights are rounded under (clipping), or both.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from lqer.formats import NumberFormat
from lqer.transforms.base import Level, Transform
from lqer.transforms.block_problem import BlockProblem
from lqer.transforms.block_result import BlockResult

# Called with the kind of the running part, its finished steps, all its steps, and the last loss, if there is one.
Progress = Callable[[str, int, int, float | None], None]
SaveState = Callable[[BlockResult], None]


def no_progress(part: str, step: int, steps: int, loss: float | None) -> None:
    """Default: report nothing."""


def save_nothing(state: Any) -> None:
    """Default: do not save intermediate state."""


class BlockTransform(Transform):
    """A transform of the linears of a block together."""

    level: ClassVar[Level] = "block"

    @abstractmethod
    def apply(
        self, problem: BlockProblem, result: BlockResult, progress: Progress, save_state: SaveState
    ) -> BlockResult:
        """`result` with this transform applied.

        A transform with many steps calls `save_state(replace(result, part_state=...))` whenever it could resume from
        there to the same result, and resumes from `result.part_state`, on any device, if that is not empty. It must
        not modify tensors it has saved.
        """


def unsupported_scales(number_format: NumberFormat, kinds: Sequence[str]) -> str | None:
    """Why the quantization ranges of a format's groups cannot be clipped; None where they can."""
    if number_format.kind not in kinds:
        return f"only weights of kind {', '.join(kinds)} can be clipped"
    if number_format.block_size == "tensor":
        return 'ranges are clipped per row or per block, not with block_size "tensor"'
    return None
