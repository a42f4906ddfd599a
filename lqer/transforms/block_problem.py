"""A decoder block whose linears are to be quantized together: its function, its inputs and its target outputs.

Shapes: S sequences, T tokens, D hidden size, B sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lqer.formats import NumberFormat
from lqer.rounding.batches import Goal
from lqer.statistics import ALONE, Gang
from lqer.transforms.block_function import BlockFunction


@dataclass(frozen=True)
class BlockProblem:
    """One decoder block to be quantized so that its outputs stay close to those of the original block.

    call: the block as a function, its parameters in float32; it rounds the inputs of linears as inference does.
    inputs_STD: float, on any device: the hidden states after the quantized blocks before this one.
    targets_STD: float, on any device: outputs of the original block on the original model's hidden states.
    formats: number formats of the weights, by the linear's name within the block.
    batch_size: sequences per forward pass. autocast: dtype of matrix products, None for the block's own.
    stored_dtypes: of parameters by name, where the checkpoint has another dtype than float32. gang: processes that have
    this very problem, and share out the batches.
    """

    call: BlockFunction
    inputs_STD: Tensor
    targets_STD: Tensor
    formats: Mapping[str, NumberFormat]
    batch_size: int
    autocast: torch.dtype | None = None
    seed: int = 0
    stored_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    gang: Gang = ALONE

    def in_stored_dtypes(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters in the dtypes of the checkpoint, except weights still to be rounded, which stay in float32."""
        weights = {f"{linear}.weight" for linear in self.formats}
        return {
            name: x if name in weights else x.to(self.stored_dtypes.get(name, x.dtype))
            for name, x in parameters.items()
        }

    @property
    def device(self) -> torch.device:
        return next(self.call.block.parameters()).device

    def with_parameters(self, changed: Mapping[str, Tensor]) -> Callable[[Mapping[str, Tensor], Tensor], Tensor]:
        """`function(weights, hidden_BTD)`: the block's output, with `changed` and then `weights` replaced in it."""
        return lambda weights, hidden_BTD: self.call({**changed, **weights}, hidden_BTD)

    @torch.no_grad()
    def outputs(self, changed: Mapping[str, Tensor]) -> Tensor:
        """Outputs (S, T, D) of the block with `changed` parameters on unrounded linear inputs; as `inputs_STD`."""
        run = self.call.without_rounding()
        outputs_STD = torch.empty_like(self.inputs_STD)

        def output(hidden_BTD: Tensor) -> Tensor:
            with self.in_autocast():
                return run(changed, hidden_BTD)

        found = self.gang.each(self.inputs_STD.split(self.batch_size), output)
        for output_BTD, found_BTD in zip(outputs_STD.split(self.batch_size), found, strict=True):
            output_BTD.copy_(found_BTD)
        return outputs_STD

    def goal(self, changed: Mapping[str, Tensor], both_targets: bool) -> Goal:
        """What weights are trained for with `changed` parameters around them: outputs close to `targets_STD`.

        both_targets: adds the loss against `outputs`, those of the original block on the same inputs.
        """
        targets = [self.targets_STD, self.outputs(changed)] if both_targets else [self.targets_STD]
        return Goal(self.with_parameters(changed), self.inputs_STD, targets, self.autocast, self.gang)

    def in_autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
