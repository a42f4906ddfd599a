"""What tensors are called in a GGUF file of an architecture, and in which order their rows stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf
import torch
from torch import Tensor

from lqer.errors import ExportError

# Others change the values of norms, or the order of fused rows, in ways of their own.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Those whose rotary embedding turns neighbouring rows, with the keys of their numbers of heads.
INTERLEAVED = {"llama": {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}}
SUFFIXES = (".weight", ".bias")


class GgufNames:
    """Names and orders for one model. config: its config.json. Raises ExportError for another architecture."""

    def __init__(self, architecture: str, blocks: int, config: Mapping[str, Any]):
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        if architecture not in ARCHITECTURES:
            raise ExportError(f"the template's architecture {architecture!r} is not one of {', '.join(ARCHITECTURES)}")
        self.architecture = architecture
        self._map = gguf.get_tensor_name_map(kinds[architecture], blocks)
        self._heads = INTERLEAVED.get(architecture, {})
        self._config = config

    def of(self, name: str) -> str:
        """The name there of a tensor of the model. Raises ExportError if it has none."""
        found = self._map.get_name(name, try_suffixes=SUFFIXES)
        if found is None:
            raise ExportError(f"{name} has no name in a GGUF file of the template's architecture")
        return found

    def ordered(self, name: str, rows: Tensor) -> Tensor:
        """The rows of a tensor in GGUF's order: of each head of width d, row j and row j + d / 2 side by side."""
        order = self._order(name, len(rows))
        return rows if order is None else rows[order]

    def restored(self, name: str, rows: Tensor) -> Tensor:
        """Rows in GGUF's order back in transformers'."""
        order = self._order(name, len(rows))
        return rows if order is None else rows[order.argsort()]

    def _order(self, name: str, rows: int) -> Tensor | None:
        key = self._heads.get(name.rpartition(".")[0].rpartition(".")[2])
        if key is None:
            return None
        return interleaved(rows, self._config.get(key) or self._config["num_attention_heads"])


def interleaved(rows: int, heads: int) -> Tensor:
    """For each row of GGUF's order, the row in transformers' order."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).flatten()
