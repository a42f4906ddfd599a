"""Distributes a model over all GPUs of the machine with accelerate: `device_map = "auto"`.

Blocks are read one at a time, each straight to its GPU: the host never holds the whole model.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from torch import nn
from transformers import PreTrainedModel

from lqer.errors import ModelError
from lqer.models.loaders import OpenedModel

DeviceMap = dict[str, int | str | torch.device]


def dispatch_all(opened: OpenedModel) -> PreTrainedModel:
    """The whole model over all GPUs. Raises ModelError if it does not fit."""
    unsplit = sorted({type(block).__name__ for block in opened.blocks})
    memory = get_balanced_memory(opened.model, no_split_module_classes=unsplit)
    device_map: DeviceMap = infer_auto_device_map(opened.model, memory, no_split_module_classes=unsplit)
    if {"cpu", "disk"} & {str(device) for device in device_map.values()}:
        raise ModelError(
            f"device_map: {type(opened.model).__name__} does not fit on the {torch.cuda.device_count()} GPUs of this "
            "machine; set evaluation.blockwise = true"
        )
    return dispatch(opened, device_map)


def dispatch(opened: OpenedModel, device_map: DeviceMap) -> PreTrainedModel:
    """The whole model, each module on the device that `device_map` assigns to it or to a module around it."""
    homes = [torch.device(device_of(f"{opened.name}.{index}", device_map)) for index in range(len(opened.blocks))]
    opened.loader.load_outer()
    device_map = with_tied_head(opened.model, device_map)
    opened.loader.materialize(opened.blocks, lambda index: homes[index])
    model = dispatch_model(opened.model, device_map)
    for block, home in zip(opened.blocks, homes, strict=True):
        if home.type == "cuda":
            launch_on(block, home)
    return model


def with_tied_head(model: PreTrainedModel, device_map: DeviceMap) -> DeviceMap:
    """The map with a tied output layer on the device of the embedding: a shared tensor has one device."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return device_map
    names = {module: name for name, module in model.named_modules()}
    home, other = device_of(names[embedding], device_map), device_of(names[head], device_map)
    return device_map if home == other else {**device_map, names[head]: home}


def launch_on(block: nn.Module, home: torch.device) -> None:
    """Run the block with `home` as the current GPU: Triton launches kernels there, wherever their tensors are."""
    forward = block.forward

    def forward_at_home(*arguments: Any, **named: Any) -> Any:
        with torch.cuda.device(home):
            return forward(*arguments, **named)

    block.forward = forward_at_home


def device_of(name: str, device_map: DeviceMap) -> int | str | torch.device:
    """The device of `name`: the map's entry for it, or for the innermost module around it."""
    parts = name.split(".")
    around = [".".join(parts[:end]) for end in range(len(parts), -1, -1)]
    return device_map[next(outer for outer in around if outer in device_map)]
