"""Writes the quantized checkpoint: packed codes of the linears, and everything outside the decoder blocks.

lqer/checkpoint/load.py describes the folder.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lqer.formats import Passthrough, QuantizedTensor, format_from_dict, pack_together, without_first
from lqer.methods import LinearPlan, QuantizedWeight
from lqer.store.names import block_file
from lqer.store.store import Workspace
from lqer.transforms.hadamard import RandomHadamard

DETAILS_FILE = "lqer.json"
OUTSIDE_FILE = "outside.safetensors"
FORMAT_VERSION = 1
FACTOR_ROLES = ("first_a", "first_b", "low_rank_a", "low_rank_b")


def pack_linears(
    names: Sequence[str], weights: Sequence[QuantizedWeight], biases: Sequence[QuantizedTensor | None]
) -> dict[str, Tensor]:
    """The tensors of linears of one shape and plan in their block's file."""
    stored: dict[str, list[QuantizedTensor | None]] = {
        "weight": [weight.weight_OI for weight in weights],
        "low_rank_a": [None if weight.low_rank is None else weight.low_rank.a_IR for weight in weights],
        "low_rank_b": [None if weight.low_rank is None else weight.low_rank.b_RO for weight in weights],
        "bias": [*biases],
    }
    tensors: dict[str, Tensor] = {}
    for role, values in stored.items():
        there = {name: value for name, value in zip(names, values, strict=True) if value is not None}
        for name, parts in zip(there, pack_together([*there.values()]), strict=True):
            tensors |= {f"{name}.{role}.{part}": tensor for part, tensor in parts.items()}
    for name, weight in zip(names, weights, strict=True):
        signs = {} if weight.rotation is None else weight.rotation.pack()
        tensors |= {f"{name}.transform.{part}": tensor for part, tensor in signs.items()}
    return tensors


def describe_linear(plan: LinearPlan, weight: QuantizedWeight, has_bias: bool) -> dict[str, Any]:
    """The entry of one linear in lqer.json."""
    entry: dict[str, Any] = {"weight": _described(weight.weight_OI)}
    if weight.low_rank is not None:
        entry["low_rank_a"] = _described(weight.low_rank.a_IR)
        entry["low_rank_b"] = _described(weight.low_rank.b_RO)
    if has_bias and plan.bias is not None:
        entry["bias"] = {"format": plan.bias.to_dict(), "shape": [weight.weight_OI.shape[0]], "axis": 0}
    if plan.activation is not None:
        entry["activation"] = plan.activation.to_dict()
    if plan.transform is not None:
        entry["transform"] = plan.transform.to_dict()
    return entry


def replace_signs(tensors: dict[str, Tensor], name: str, signs: Mapping[str, Tensor]) -> int:
    """Replace the packed signs of a linear's rotation by `signs`, by role, in place. Returns the change in bits."""
    before = sum(
        part.numel() for part in packed_parts(tensors, f"{name}.transform.", signs["input_signs"].device).values()
    )
    after = RandomHadamard(signs["input_signs"], signs["output_signs"])
    tensors |= {f"{name}.transform.{part}": tensor for part, tensor in after.pack().items()}
    return after.bits - 8 * before


def split_columns(tensors: dict[str, Tensor], name: str, entry: dict[str, Any], factors: Mapping[str, Tensor]) -> int:
    """Replace the first columns of the stored A and the first rows of the stored B by unrounded ones, in place.

    factors: "low_rank_a" (I, C) and "low_rank_b" (C, O) in bfloat16, which are stored as roles "first_a" and "first_b".
    Returns the change in bits.
    """
    more = 0
    for role, first in factors.items():
        along = 1 if role == "low_rank_a" else 0
        stored = unpack_role(tensors, name, role, entry, first.device)
        assert stored is not None
        is_all = first.shape[along] == stored.shape[along]
        for key in [key for key in tensors if key.startswith(f"{name}.{role}.")]:
            del tensors[key]
        new = {role.replace("low_rank", "first"): Passthrough("bfloat16").quantize(first, axis=0)}
        new |= {} if is_all else {role: without_first(stored, along, first.shape[along])}
        del entry[role]
        for new_role, value in new.items():
            entry[new_role] = _described(value)
            tensors |= {f"{name}.{new_role}.{part}": tensor for part, tensor in value.pack().items()}
            more += value.code_bits + value.metadata_bits
        more -= stored.code_bits + stored.metadata_bits
    return more


def _described(value: QuantizedTensor) -> dict[str, Any]:
    return {"format": value.format.to_dict(), "shape": list(value.shape), "axis": value.axis}


def write_outer(
    workspace: Workspace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    details: Mapping[str, Any],
    processor: Iterable[Path],
) -> None:
    """Write everything outside the decoder blocks: tensors, configuration, tokenizer, processor files, lqer.json."""
    inside = f"{details['blocks']['name']}."
    outside: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in model.state_dict().items():
        # Tied weights share storage: they are stored under the first name, and tie_weights restores the others.
        if not name.startswith(inside) and tensor.data_ptr() not in storages:
            storages.add(tensor.data_ptr())
            outside[name] = tensor
    workspace.write_tensors(OUTSIDE_FILE, outside)
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        # Keep chat templates inside tokenizer_config.json: several of them would otherwise get a folder.
        tokenizer.save_pretrained(folder, save_jinja_files=False)
        for file in sorted(Path(folder).iterdir()):
            if file.name != "config.json":
                workspace.write(file.name, partial(shutil.copyfile, file))
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    for file in processor:
        workspace.write(file.name, partial(shutil.copyfile, file))
    # Identifies the folder to other loaders than load_quantized.
    config["quantization_config"] = {"quant_method": "lqer", "details": DETAILS_FILE}
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    workspace.write_json("config.json", config)
    workspace.write_json(DETAILS_FILE, {"format_version": FORMAT_VERSION, **details})


def packed_parts(tensors: Mapping[str, Tensor], prefix: str, device: torch.device) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names, on the device."""
    return {key.removeprefix(prefix): tensor.to(device) for key, tensor in tensors.items() if key.startswith(prefix)}


def unpack_role(
    tensors: Mapping[str, Tensor], name: str, role: str, entry: Mapping[str, Any], device: torch.device
) -> QuantizedTensor | None:
    """The quantized tensor of one role of a linear, such as "weight"; None if its `entry` of lqer.json has none."""
    if role not in entry:
        return None
    packed, described = packed_parts(tensors, f"{name}.{role}.", device), entry[role]
    return format_from_dict(described["format"]).unpack(packed, tuple(described["shape"]), described["axis"])


def checkpoint_bytes(folder: Path, blocks: int) -> int:
    """The size of the files that hold a checkpoint's tensors: what a loaded model needs, unquantized parameters too."""
    return sum((folder / name).stat().st_size for name in (OUTSIDE_FILE, *map(block_file, range(blocks))))
