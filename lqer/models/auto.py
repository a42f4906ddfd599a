"""Which of transformers' auto classes builds a model: a causal language model, or one that wraps it with other inputs;
and how it is built without values.

A wrapper, such as ...ForConditionalGeneration, holds a language model beside towers for images or sound. Of some
configurations transformers knows both: the checkpoint's own `architectures` decides, so that nothing of it is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig
from transformers.models.auto.auto_factory import _LazyAutoMapping

# Values of a tensor that is only a parameter: more than any table that a model computes for itself.
LARGE = 1 << 26
# Where functions are that fill a tensor with its first values; while it builds a model, transformers puts its own into
# the place of torch's.
INITIALIZERS = frozenset({"torch.nn.init", "transformers.initialization"})


@contextmanager
def without_values() -> Iterator[None]:
    """Models built within have parameters on the meta device, and buffers, such as rotary tables, computed for real.

    accelerate's own context allocates each parameter for a moment: 30 GB for the experts of a layer of DeepSeek-V3. And
    it lets transformers initialize parameters without values, which is most of the time that this takes.
    """
    with init_empty_weights(include_buffers=False), _NoValues():
        yield


class _NoValues(TorchFunctionMode):
    """Gives large uninitialized tensors no memory, and initializes none without values."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        filled = kwargs.get("tensor")
        if filled is not None and filled.is_meta and getattr(func, "__module__", None) in INITIALIZERS:
            return filled
        if func is torch.empty and kwargs.get("device") is None and _values(*args) >= LARGE:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _values(*size: Any) -> int:
    sizes = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size
    return prod(sizes)


def auto_class(config: PreTrainedConfig) -> Any:
    """AutoModelForCausalLM, or AutoModelForMultimodalLM for a model that only it knows or that was saved as its own."""
    causal = _class_names(AutoModelForCausalLM._model_mapping, config)
    wrapping = _class_names(AutoModelForMultimodalLM._model_mapping, config)
    saved_as = set(config.architectures or ())
    if wrapping and (not causal or (saved_as & wrapping and not saved_as & causal)):
        return AutoModelForMultimodalLM
    return AutoModelForCausalLM


def _class_names(mapping: _LazyAutoMapping, config: PreTrainedConfig) -> set[str]:
    found: Any = mapping.get(type(config), ())
    return {one.__name__ for one in (found if isinstance(found, tuple) else (found,))}
