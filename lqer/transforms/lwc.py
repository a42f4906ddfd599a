"""Learnable weight clipping as a transform of a block: OmniQuant's (arXiv 2308.13137), alone or after AWQ's.

The ranges are learnt in learnt_ranges.py, on the block's inputs and targets; its weights are then rounded under them.

Shapes: O out_features, N groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from lqer.components import ADDED, require_choice, require_number, require_positive
from lqer.transforms.base import Scheme
from lqer.transforms.block_problem import BlockProblem
from lqer.transforms.block_result import BlockResult
from lqer.transforms.block_transform import BlockTransform, Progress, SaveState, unsupported_scales
from lqer.transforms.clip import SHRINK_FACTORS, search_block
from lqer.transforms.learnt_ranges import ClippingSettings, ClippingState, learn_clipping, quantize_learnt, start_at


@dataclass(frozen=True)
class Lwc(BlockTransform):
    """`lwc` as a configuration names it.

    epochs: 20 for three and four bits, 40 for two (OmniQuant), 5 after AWQ. batch_size: sequences of a step.
    both_targets: adds the loss against the original block's output on the same inputs (OmniQuant, for two bits).
    start: "full" begins at nearly the whole range (OmniQuant), "search" at the best factors of AWQ's search
    (lqer/transforms/clip.py). micro_batch: sequences in one pass, by default all of a step; it bounds the memory, and
    is what several processes share out.
    """

    kind = "lwc"
    fixes_scales: ClassVar[bool] = True
    learning_bytes: ClassVar[int] = 40

    epochs: int = 20
    batch_size: int = 1
    learning_rate: float = 1e-2
    both_targets: bool = False
    start: Literal["full", "search"] = field(default="full", metadata=ADDED)
    micro_batch: int | None = field(default=None, metadata=ADDED)

    def __post_init__(self) -> None:
        require_positive("epochs", self.epochs, self.kind)
        require_positive("batch_size", self.batch_size, self.kind)
        if self.micro_batch is not None:
            require_positive("micro_batch", self.micro_batch, self.kind)
        require_number("learning_rate", self.learning_rate, self.kind)
        require_choice("both_targets", self.both_targets, [False, True], self.kind)
        require_choice("start", self.start, ["full", "search"], self.kind)

    @property
    def learning_batch(self) -> int:
        return self.micro_batch or self.batch_size

    def unsupported_reason(self, scheme: Scheme) -> str | None:
        return unsupported_scales(scheme.weight, ("int",))

    def apply(
        self, problem: BlockProblem, result: BlockResult, progress: Progress, save_state: SaveState
    ) -> BlockResult:
        """Learn the clipped ranges of every linear and fix its scales to them.

        Raises ArithmeticError if the loss stops being finite.
        """
        weights = {f"{linear}.weight": result.weight(problem, linear) for linear in problem.formats}
        formats = {f"{linear}.weight": number_format for linear, number_format in problem.formats.items()}
        goal = problem.goal(result.parameters, self.both_targets)
        settings = ClippingSettings(self.epochs, self.batch_size, self.learning_rate, problem.seed, self.learning_batch)
        state = ClippingState.from_tensors(result.part_state) if result.part_state else None
        losses = [] if state is None else state.losses.tolist()
        progress(self.kind, len(losses), self.epochs, losses[-1] if losses else None)
        if state is None and self.start == "search":
            found = search_block(problem, result, SHRINK_FACTORS)
            state = start_at({f"{linear}.weight": factor_ON for linear, factor_ON in found.items()})

        def after_epoch(state: ClippingState) -> None:
            losses.append(float(state.losses[-1]))
            progress(self.kind, state.epochs, self.epochs, losses[-1])
            save_state(replace(result, part_state=state.tensors()))

        factors = learn_clipping(weights, formats, goal, settings, state, after_epoch)
        rounded = {
            linear: quantize_learnt(weights[f"{linear}.weight"], problem.formats[linear], factors[f"{linear}.weight"])
            for linear in problem.formats
        }
        return replace(result, rounded={**result.rounded, **rounded}).with_note(self.kind, losses)
