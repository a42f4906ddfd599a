"""Opens the original model as a stage needs it: whole, or as stored in the checkpoint and read block by block."""

from __future__ import annotations

from typing import Literal

import torch
from transformers import PreTrainedModel

from lqer.models.coded import is_coded
from lqer.models.dispatch import dispatch_all
from lqer.models.loaders import OpenedModel
from lqer.models.source import ModelSource, load_model, load_model_config, stored_dtype
from lqer.models.streaming import open_model
from lqer.models.structure import ONLINE_ROTATIONS

DevicePlacement = Literal["single", "auto"]


def spans_gpus(device: torch.device, device_map: DevicePlacement) -> bool:
    """Whether a whole model is dispatched over several GPUs rather than put on `device`."""
    return device_map == "auto" and device.type == "cuda" and torch.cuda.device_count() > 1


def load_whole(
    source: ModelSource, dtype: torch.dtype | str, device: torch.device, device_map: DevicePlacement = "single"
) -> PreTrainedModel:
    """The model in memory, on `device` or over all GPUs. Raises ModelError if it cannot be loaded or does not fit."""
    if spans_gpus(device, device_map):
        return dispatch_all(open_model(source, dtype, torch.device("cpu")))
    # For a GPU blocks are read ahead into page-locked memory, by several threads.
    if device.type == "cuda" or is_coded(load_model_config(source)):
        return open_model(source, dtype, device).whole()
    return load_model(source, dtype, device)


def open_stored(source: ModelSource, device: torch.device) -> OpenedModel:
    """The weights that quantization starts from, in the dtype they are stored in.

    A rotated model (lqer/stages/rotate.py) has blocks in float32 and everything else in the original's dtype.
    """
    if not hasattr(load_model_config(source), ONLINE_ROTATIONS):
        return open_model(source, "auto", device)
    opened = open_model(source, torch.float32, device)
    opened.loader.load_outer()
    inside = {id(parameter) for parameter in opened.blocks.parameters()}
    for parameter in opened.model.parameters():
        if id(parameter) not in inside:
            parameter.data = parameter.data.to(stored_dtype(source))
    return opened
