"""Where the work on one decoder block stands, as tensors alone: what a killed run goes on from with the same numbers.

It keeps what finished transforms have made rather than how: on a GPU the backward pass of a learnt one is not
deterministic, and rounding variables belong to the very scales and weights that they were learnt under.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lqer.formats import QuantizedTensor
from lqer.transforms.block_problem import BlockProblem, Prepared

CHANGED, STARTS, LEARNT, NOTES, FINISHED = "changed.", "starts.", "learnt.", "notes", "finished"


@dataclass(frozen=True)
class BlockState:
    """The first `finished` transforms are done and left `prepared`; the part after them is being learnt.

    learnt: that part's own state after an epoch or a round, flat, with its "losses" (steps,); empty before the first.
    """

    prepared: Prepared = field(default_factory=Prepared)
    finished: int = 0
    learnt: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Epochs or rounds of the part that is being learnt."""
        return len(self.learnt["losses"]) if self.learnt else 0

    def tensors(self) -> dict[str, Tensor]:
        """All of it under flat names, for a file of tensors; notes as the UTF-8 bytes of their JSON."""
        prepared = self.prepared
        notes = json.dumps(dict(prepared.notes)).encode()
        return {
            FINISHED: torch.tensor(self.finished),
            NOTES: torch.frombuffer(bytearray(notes), dtype=torch.uint8),
            **{f"{CHANGED}{name}": tensor for name, tensor in prepared.changed.items()},
            **{
                f"{STARTS}{part}.{linear}": tensor
                for linear, start in prepared.starts.items()
                for part, tensor in start.parts.items()
            },
            **{f"{LEARNT}{name}": tensor for name, tensor in self.learnt.items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], problem: BlockProblem) -> BlockState:
        """The inverse of `tensors` for the same problem: what is prepared on its device, what is learnt as it comes."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in _under(STARTS, tensors).items():
            part, linear = name.split(".", 1)
            parts.setdefault(linear, {})[part] = tensor.to(problem.device)
        starts = {
            linear: QuantizedTensor(
                problem.formats[linear], tuple(problem.call.block.get_parameter(f"{linear}.weight").shape), 1, found
            )
            for linear, found in parts.items()
        }
        changed = {name: tensor.to(problem.device) for name, tensor in _under(CHANGED, tensors).items()}
        notes = json.loads(bytes(tensors[NOTES].tolist()))
        return cls(Prepared(changed, starts, notes), int(tensors[FINISHED]), _under(LEARNT, tensors))


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
