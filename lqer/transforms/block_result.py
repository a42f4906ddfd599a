"""What transforms and rounding have made of a decoder block so far, as tensors that a killed run resumes from.

The outcome of finished transforms is stored rather than recomputed: on a GPU the backward pass of a learned transform
is not deterministic, and rounding variables only make sense under the very scales and weights they were learned for.
So are the formats of rounded weights: a transform may round in another format than the plan's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lqer.formats import QuantizedTensor, format_from_dict
from lqer.transforms.block_problem import BlockProblem

PARAMETERS, ROUNDED, PART_STATE = "parameters.", "rounded.", "part_state."
FORMATS, NOTES, FINISHED = "formats", "notes", "finished"


@dataclass(frozen=True)
class BlockResult:
    """A block after its first `finished` transforms, and after its rounding where that is done.

    parameters: changed parameters by name within the block; weights of linears in float32, as they are to be rounded.
    rounded: quantized weights by linear, where scales are fixed; rounded to nearest, or by adaptive rounding.
    notes: findings for the report, by the kind of the part, as JSON can hold them.
    part_state: optimizer state of the part after the finished ones, by flat names, with its "losses" (steps,); empty
        before its first epoch or round.
    """

    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    rounded: Mapping[str, QuantizedTensor] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    finished: int = 0
    part_state: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Finished epochs or rounds of the part that `part_state` belongs to."""
        return len(self.part_state["losses"]) if self.part_state else 0

    def weight(self, problem: BlockProblem, linear: str) -> Tensor:
        """The current weight (out_features, in_features) of a linear before rounding, float32."""
        name = f"{linear}.weight"
        return self.parameters.get(name, problem.call.block.get_parameter(name)).detach()

    def with_note(self, kind: str, note: Any) -> BlockResult:
        return replace(self, notes={**self.notes, kind: note})

    def tensors(self) -> dict[str, Tensor]:
        """All of it under flat names, for a safetensors file; formats and notes as the UTF-8 bytes of their JSON."""
        return {
            FINISHED: torch.tensor(self.finished),
            FORMATS: _json_tensor({linear: weight.format.to_dict() for linear, weight in self.rounded.items()}),
            NOTES: _json_tensor(dict(self.notes)),
            **{f"{PARAMETERS}{name}": tensor for name, tensor in self.parameters.items()},
            **{
                f"{ROUNDED}{part}.{linear}": tensor
                for linear, weight in self.rounded.items()
                for part, tensor in weight.parts.items()
            },
            **{f"{PART_STATE}{name}": tensor for name, tensor in self.part_state.items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], problem: BlockProblem) -> BlockResult:
        """The inverse of `tensors` for the same problem, on its device; `part_state` stays on the device it is on."""
        formats = _json(tensors[FORMATS])
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in _under(ROUNDED, tensors).items():
            part, linear = name.split(".", 1)
            parts.setdefault(linear, {})[part] = tensor.to(problem.device)
        rounded = {
            linear: QuantizedTensor(
                format_from_dict(formats[linear]),
                tuple(problem.call.block.get_parameter(f"{linear}.weight").shape),
                1,
                found,
            )
            for linear, found in parts.items()
        }
        parameters = {name: tensor.to(problem.device) for name, tensor in _under(PARAMETERS, tensors).items()}
        return cls(parameters, rounded, _json(tensors[NOTES]), int(tensors[FINISHED]), _under(PART_STATE, tensors))


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _json_tensor(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _json(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))
