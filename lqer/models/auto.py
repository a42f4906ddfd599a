"""Which of transformers' auto classes builds a model: a causal language model, or one that wraps it with other inputs.

A wrapper, such as ...ForConditionalGeneration, holds a language model beside towers for images or sound. Of some
configurations transformers knows both: the checkpoint's own `architectures` decides, so that nothing of it is dropped.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig
from transformers.models.auto.auto_factory import _LazyAutoMapping


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
