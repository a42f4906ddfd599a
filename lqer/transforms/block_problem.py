"""What a block-level transform is given, and what it leaves behind.

A transform of this level sees one decoder block with the hidden states that reach it and what its outputs should be. It
changes parameters such that the block's function stays as it is (scales folded into neighbours), or fixes the scales
under which weights are rounded (clipping), or both.

Shapes: S sequences, T tokens, D hidden size, O out_features, I in_features.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lqer.formats import NumberFormat, QuantizedTensor
from lqer.transforms.base import Level, Transform
from lqer.transforms.block_function import BlockFunction

# What is being done, how much of it is done, out of how much, and the loss where there is one.
Progress = Callable[[str, int, int, float | None], None]


def no_progress(what: str, done: int, total: int, loss: float | None) -> None:
    """For whoever does not want to know."""


def keep_nothing(state: Any) -> None:
    """For whoever does not go on after a kill."""


@dataclass(frozen=True)
class Session:
    """What a transform's caller wants to know of it, and where an earlier session left off.

    state: what the same transform of the same problem last gave to `keep`, on any device; None to begin. keep gets flat
    tensors, among them the "losses" (epochs,), whenever the transform could go on from them to the same result; they
    are not changed afterwards. A transform that takes no longer than writing its state would keeps none.
    """

    progress: Progress = no_progress
    state: Mapping[str, Tensor] | None = None
    keep: Callable[[Mapping[str, Tensor]], None] = keep_nothing


@dataclass(frozen=True)
class BlockProblem:
    """A decoder block whose linears are to be rounded.

    call: the block as a function, its parameters in float32; it rounds the inputs of linears as they will be.
    inputs_STD, targets_STD: float, on any device: what reaches the block once the blocks before it are quantized, and
    what the original block makes of the original inputs. formats: of the weights, by the linear's name within the
    block. batch_size: sequences that pass the block at once. autocast: the dtype of products, None for the block's own.
    kept_dtypes: of parameters by name, where what is stored has another dtype than float32.
    """

    call: BlockFunction
    inputs_STD: Tensor
    targets_STD: Tensor
    formats: Mapping[str, NumberFormat]
    batch_size: int
    autocast: torch.dtype | None = None
    seed: int = 0
    kept_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    def as_kept(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters as they are stored: weights that will be rounded in float32, the others in their own dtypes."""
        weights = {f"{linear}.weight" for linear in self.formats}
        return {
            name: x if name in weights else x.to(self.kept_dtypes.get(name, x.dtype)) for name, x in parameters.items()
        }

    @property
    def device(self) -> torch.device:
        return next(self.call.block.parameters()).device

    def with_changed(self, changed: Mapping[str, Tensor]) -> Callable[[Mapping[str, Tensor], Tensor], Tensor]:
        """The block as a function of the weights that are still open, those in `changed` being replaced."""
        return lambda weights, hidden_BTD: self.call({**changed, **weights}, hidden_BTD)

    @torch.no_grad()
    def outputs(self, changed: Mapping[str, Tensor]) -> Tensor:
        """What the block with its linears' inputs as they are makes of its inputs, where and as those are held."""
        run = self.call.without_rounding()
        outputs_STD = torch.empty_like(self.inputs_STD)
        parts = zip(outputs_STD.split(self.batch_size), self.inputs_STD.split(self.batch_size), strict=True)
        for place_BTD, hidden_BTD in parts:
            with self.in_autocast():
                place_BTD.copy_(run(changed, hidden_BTD))
        return outputs_STD

    def in_autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)


@dataclass(frozen=True)
class Prepared:
    """What the transforms so far have made of a block.

    changed: parameters by name within the block. starts: linears whose scales are fixed, rounded to nearest under them.
    notes: what a report may show, by the kind of the transform.
    """

    changed: Mapping[str, Tensor] = field(default_factory=dict)
    starts: Mapping[str, QuantizedTensor] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def weight(self, problem: BlockProblem, linear: str) -> Tensor:
        """The weight (O, I) of a linear as it is now, float32."""
        name = f"{linear}.weight"
        return self.changed.get(name, problem.call.block.get_parameter(name)).detach()

    def noted(self, kind: str, note: Any) -> Prepared:
        return replace(self, notes={**self.notes, kind: note})


class BlockTransform(Transform):
    """A transform of the linears of a block together."""

    level: ClassVar[Level] = "block"

    @abstractmethod
    def apply(self, problem: BlockProblem, prepared: Prepared, session: Session) -> Prepared:
        """The block with this transform after those of `prepared`."""


def unsupported_scales(number_format: NumberFormat, kinds: Sequence[str]) -> str | None:
    """Why the ranges of such a format's groups cannot be narrowed; None where they can."""
    if number_format.kind not in kinds:
        return f"ranges are narrowed for weights of kind {', '.join(kinds)}"
    if number_format.block_size == "tensor":
        return 'ranges are narrowed per row or block of a weight, not with block_size "tensor"'
    return None
