"""Codes with error feedback before a block's linears are rounded together: the best start that has a closed form.

Every linear is rounded by GPTQ (lqer/rounding/gptq.py) on E[x xᵀ] of its inputs in the block with its current weights,
that is, after the transforms before this one. Rounding `nearest` keeps these codes: AWQ's scales with GPTQ's codes.
Rounding `adaptive` trains from them with start = "codes", and from their scales alone with start = "weights".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from lqer.components import require_choice
from lqer.formats.blocks import BlockSize
from lqer.rounding.base import require_damping
from lqer.rounding.gptq import gptq
from lqer.rounding.hessian import DAMPING, DampedHessian
from lqer.rounding.scale_search import Scales, require_scales
from lqer.transforms.base import Scheme
from lqer.transforms.block_problem import BlockProblem
from lqer.transforms.block_result import BlockResult
from lqer.transforms.block_statistics import hessian_blocks
from lqer.transforms.block_transform import BlockTransform, Progress, SaveState, unsupported_scales


@dataclass(frozen=True)
class GptqStart(BlockTransform):
    """`gptq` as a configuration names it, with the settings of the rounding of that name."""

    kind = "gptq"
    fixes_scales: ClassVar[bool] = True

    damping: float = DAMPING
    activation_order: bool = False
    scales: Scales = "minmax"

    def __post_init__(self) -> None:
        require_damping(self.damping, self.kind)
        require_choice("activation_order", self.activation_order, [False, True], self.kind)
        require_scales(self.scales, self.kind)

    def unsupported_reason(self, scheme: Scheme) -> str | None:
        return unsupported_scales(scheme.weight, ("int", "mxint"))

    @torch.no_grad()
    def apply(
        self, problem: BlockProblem, result: BlockResult, progress: Progress, save_state: SaveState
    ) -> BlockResult:
        """Round every linear."""
        progress(self.kind, 0, 1, None)
        whole: dict[str, BlockSize] = dict.fromkeys(problem.formats, "row")
        squares = hessian_blocks(problem, result.parameters, whole)
        # Linears that share an input share the very tensor, and so its factor.
        damped = {id(square): DampedHessian(square.squeeze(0), self.damping) for square in squares.values()}
        rounded = {
            linear: gptq(
                result.weight(problem, linear), damped[id(squares[linear])], number_format,
                activation_order=self.activation_order, scales=self.scales,
            )
            for linear, number_format in problem.formats.items()
        }  # fmt: skip
        return replace(result, rounded=rounded)
