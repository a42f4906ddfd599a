"""The tensors of one linear, gathered as an engine hands them over, one at a time and in any order.

An engine knows them by flat names, "weight_codes" for what files call "weight.codes".
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lqer.checkpoint.linear import LinearTensors, read_linear
from lqer.checkpoint.pack import FACTOR_ROLES
from lqer.errors import ModelError
from lqer.formats import NumberFormat, format_from_dict

ROLES = ("weight", *FACTOR_ROLES, "bias")
SIGNS = ("transform.input_signs", "transform.output_signs")
# Whole tiles and vectors of every format.
SMALL = (16, 16)
# How names in files become names of parameters: a pattern of `re`, and what replaces it.
FLAT_NAMES = (rf"\.({'|'.join((*ROLES, 'transform'))})\.(\w+)$", r".\1_\2")


class StoredLinear:
    """One linear of a checkpoint: what it is made of, and what of that has arrived.

    name: in the checkpoint. entry: of lqer.json.
    """

    def __init__(self, name: str, entry: Mapping[str, Any]):
        self.name, self.entry = name, entry
        self.out_features, self.in_features = entry["weight"]["shape"]
        self.dtypes = _dtypes(entry)
        self._tensors: dict[str, Tensor] = {}

    def add(self, part: str, tensor: Tensor) -> bool:
        """Keep a tensor, by its name within the linear; whether all have now arrived."""
        if part not in self.dtypes:
            raise ModelError(f"{self.name} has no tensor {part}")
        self._tensors[f"{self.name}.{part}"] = tensor
        return len(self._tensors) == len(self.dtypes)

    def take(self, device: torch.device) -> LinearTensors:
        """The linear, on the device; what has arrived is let go. Raises ModelError if a tensor is missing."""
        missing = [part for part in self.dtypes if f"{self.name}.{part}" not in self._tensors]
        if missing:
            raise ModelError(f"the checkpoint has no tensor {self.name}.{missing[0]}")
        tensors, self._tensors = self._tensors, {}
        return read_linear(tensors, self.name, self.entry, device)


def _dtypes(entry: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """The dtype of each tensor of a linear, by its name within the linear."""
    found: dict[str, torch.dtype] = {}
    for role in ROLES:
        if role in entry:
            parts = _stored_parts(format_from_dict(entry[role]["format"]))
            found |= {f"{role}.{part}": dtype for part, dtype in parts.items()}
    # Signs that were trained are floats.
    return found | (dict.fromkeys(SIGNS, torch.uint8) if "transform" in entry else {})


@lru_cache
def _stored_parts(number_format: NumberFormat) -> Mapping[str, torch.dtype]:
    """The parts that a matrix in this format is stored as, found by storing a small one."""
    return {part: tensor.dtype for part, tensor in number_format.quantize(torch.zeros(SMALL)).pack().items()}
