"""The native form of a checkpoint: a folder that transformers' `from_pretrained` loads in a program that imports lqer.

    block-00000.safetensors, ..     as in the checkpoint (load.py), byte for byte
    outside.safetensors
    config.json                     "quantization_config" holds what lqer.json says: it travels with save_pretrained
    model.safetensors.index.json    which file holds which tensor
    guard.safetensors               an empty tensor with the name of one linear's weight

Where lqer is not imported, transformers skips a quantization it does not know, finds no weights for the linears and
goes on with random ones. The guard has a name that it looks for, in a shape that it refuses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from lqer.checkpoint.pack import FORMAT_VERSION
from lqer.checkpoint.quantizer import QUANT_METHOD
from lqer.models.auto import auto_class
from lqer.models.coded import QUANTIZATION_CONFIG
from lqer.models.files import read_header, reported_as
from lqer.models.open import DevicePlacement, spans_gpus

GUARD_FILE = "guard.safetensors"


def native_config(details: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization_config of config.json, from the contents of lqer.json.

    What several linears have in common stands once, in "schemes", and "linears" has its place in that list by name.
    """
    schemes: list[Any] = []
    for entry in details["linears"].values():
        if entry not in schemes:
            schemes.append(entry)
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "blocks": details["blocks"],
        "attention": details["attention"],
        "schemes": schemes,
        "linears": {name: schemes.index(entry) for name, entry in details["linears"].items()},
    }


def weight_index(files: Iterable[Path]) -> dict[str, Any]:
    """The contents of model.safetensors.index.json for these files of one folder."""
    headers = {file: read_header(file) for file in files}
    weight_map = {name: file.name for file, header in headers.items() for name in header.shapes}
    total = sum(file.stat().st_size for file in headers)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def is_native(path: Path) -> bool:
    """Whether the folder holds the native form of a checkpoint."""
    file = path / "config.json"
    if not file.is_file():
        return False
    with reported_as(f"{path} has no usable config.json"):
        described = json.loads(file.read_text(encoding="utf-8")).get(QUANTIZATION_CONFIG) or {}
        return described.get("quant_method") == QUANT_METHOD and "schemes" in described


def load_native(
    path: Path, device: torch.device, dtype: torch.dtype | None, backend: str, device_map: DevicePlacement
) -> PreTrainedModel:
    """The model in such a folder, with the defaults of `load_quantized`."""
    config: Any = AutoConfig.from_pretrained(path, trust_remote_code=False)
    config.quantization_config["backend"] = backend
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    places = "auto" if spans_gpus(device, device_map) else {"": device}
    return auto_class(config).from_pretrained(
        path, config=config, dtype=dtype or "auto", device_map=places, trust_remote_code=False
    )
