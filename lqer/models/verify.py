"""Holds the tensors of a checkpoint against those of its model, by name, shape and dtype, before any value is read.

transformers fills parameters that a checkpoint lacks with random numbers and drops tensors that it does not know. Here
both are errors, except for tensors that transformers itself ignores, such as rotary tables.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lqer.errors import ModelError
from lqer.models.auto import auto_class, without_values
from lqer.models.files import Header, reported_as

# Names that wrappers put in front of all tensors, and how to save the model without them.
WRAPPERS = {
    "module.": "a DistributedDataParallel wrapper: save model.module",
    "_orig_mod.": "a compiled model (torch.compile): save model._orig_mod",
    "base_model.model.": "a PEFT model: save model.merge_and_unload()",
}
STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_tensors(name: str, config: Any, headers: Collection[Header]) -> None:
    """Raise ModelError if loading would not take every parameter of the model `name` from its files, and nothing else.

    It is transformers that matches the tensors, on the meta device: a checkpoint whose tensors it renames or merges is
    accepted. Codes with scales count as what they stand for (lqer/models/coded.py).
    """
    shapes = {tensor: shape for header in headers for tensor, shape in header.shapes.items()}
    dtypes = {tensor: dtype for header in headers for tensor, dtype in header.dtypes.items()}
    _refuse_wrapped(name, shapes)
    with reported_as(f"model: {name} cannot be built from its configuration"), without_values():
        model = auto_class(config).from_config(config)
    _refuse_codes(name, model, dtypes)
    tensors = {
        tensor: torch.empty(shape, dtype=STORED_DTYPES.get(dtypes[tensor], torch.int64), device="meta")
        for tensor, shape in shapes.items()
    }
    with reported_as(f"model: {name} cannot be loaded"), quiet_loading():
        _, found = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=tensors,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    refuse_mismatch(name, found)


def refuse_mismatch(name: str, found: Mapping[str, Any]) -> None:
    """Raise ModelError for what `from_pretrained(..., output_loading_info=True)` says is missing or left over."""
    for tensor, stored, expected in sorted(found["mismatched_keys"]):
        raise ModelError(
            f"model: {tensor} of {name} has shape {list(stored)}, and its config.json implies {list(expected)}"
        )
    for what, key in (
        ("has no tensor", "missing_keys"),
        ("has a tensor that its model does not use:", "unexpected_keys"),
    ):
        if tensors := sorted(found[key], key=_in_order):
            others = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
            raise ModelError(
                f"model: {name} {what} {tensors[0]}{others}: its files and config.json do not match, or a file is "
                "incomplete"
            )
    if found["error_msgs"]:
        raise ModelError(f"model: {name} cannot be loaded: {found['error_msgs'][0].splitlines()[0]}")


def refuse_foreign_linears(name: str, model: PreTrainedModel) -> None:
    """Raise ModelError for a linear whose weight is not all there is to it, such as codes with scales."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            extra = {key for key, _ in [*module.named_parameters(), *module.named_buffers()]} - {"weight", "bias"}
            if extra or not module.weight.is_floating_point() or module.weight.itemsize < 2:
                raise ModelError(
                    f"model: {path} of {name} is a {type(module).__name__}, whose weight is quantized already"
                )


def _refuse_wrapped(name: str, tensors: Collection[str]) -> None:
    for prefix, advice in WRAPPERS.items():
        if tensors and all(tensor.startswith(prefix) for tensor in tensors):
            raise ModelError(f'model: the names of all tensors of {name} begin with "{prefix}", as of {advice}')


def _refuse_codes(name: str, model: PreTrainedModel, dtypes: Mapping[str, str]) -> None:
    """Raise ModelError for a parameter whose stored values are not floating-point numbers of 16 bits or more."""
    parameters: Mapping[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}."
    for tensor, dtype in dtypes.items():
        if dtype in STORED_DTYPES:
            continue
        is_parameter = any(key in parameters for key in (tensor, f"{prefix}{tensor}", tensor.removeprefix(prefix)))
        if is_parameter or dtype.startswith(("F4", "F6", "F8")):
            raise ModelError(
                f"model: {tensor} of {name} is stored as {dtype}: it is quantized already, and its config does "
                "not say how; use the original model"
            )


def _in_order(name: str) -> list[tuple[int, str]]:
    """Block 10 after block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Drop the table in which transformers logs what `refuse_mismatch` says in one line."""

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_error)
    try:
        yield
    finally:
        logger.removeFilter(is_error)
