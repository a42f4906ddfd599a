"""Low-rank factors as a GGUF LoRA adapter beside the weights without them: `--lora adapter.gguf` of llama.cpp.

    general.type "adapter", adapter.type "lora", adapter.lora.alpha 0: its scale is then 1 for any rank
    <weight>.lora_a float32 [R, I] = Aᵀ, <weight>.lora_b float32 [O, R] = Bᵀ, whose rows are in the weight's order

Shapes: I in_features, O out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import gguf
import torch
from torch import nn
from transformers import PreTrainedModel

from lqer.export.gguf_names import GgufNames
from lqer.export.peft import lora_factors
from lqer.export.source import Linear

ADAPTER_FILE = "adapter.gguf"
WITHOUT_SCALE = 0.0
LORA_A, LORA_B = ".lora_a", ".lora_b"


def write_adapter(path: Path, names: GgufNames, linears: Iterable[Linear]) -> None:
    """Write the factors of those linears that have some."""
    writer = gguf.GGUFWriter(path, names.architecture, use_temp_file=True)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, WITHOUT_SCALE)
    for linear in linears:
        if factors := lora_factors(linear):
            name = f"{linear.name}.weight"
            writer.add_tensor(names.of(name) + LORA_A, factors["lora_A"].numpy())
            writer.add_tensor(names.of(name) + LORA_B, names.ordered(name, factors["lora_B"]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, path: Path, names: GgufNames) -> None:
    """Add the products of an adapter to the weights of a model that was read without it, in place."""
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(path).tensors}
    for module, linear in model.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        name = f"{module}.weight"
        if (a_RI := stored.pop(names.of(name) + LORA_A, None)) is not None:
            b_OR = names.restored(name, stored.pop(names.of(name) + LORA_B))
            linear.weight += (b_OR @ a_RI).to(linear.weight.dtype)
    if stored:
        raise ValueError(f"{path.name} holds {next(iter(stored))}, which belongs to no linear")
