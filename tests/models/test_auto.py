"""The auto class of a model follows what its checkpoint was saved as."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from lqer.models.auto import auto_class


@pytest.mark.parametrize(
    ("kind", "saved_as", "expected"),
    [
        ("llama", None, AutoModelForCausalLM),
        ("qwen2_5_vl", None, AutoModelForMultimodalLM),
        ("qwen3_5", None, AutoModelForCausalLM),
        ("qwen3_5", "Qwen3_5ForCausalLM", AutoModelForCausalLM),
        ("qwen3_5", "Qwen3_5ForConditionalGeneration", AutoModelForMultimodalLM),
        # A class that transformers knows under both names.
        ("gemma3", "Gemma3ForConditionalGeneration", AutoModelForCausalLM),
        # Neither: it is refused where it is built.
        ("vit", None, AutoModelForCausalLM),
    ],
)
def test_a_checkpoint_is_built_as_what_it_was_saved_as(kind, saved_as, expected):
    config = AutoConfig.for_model(kind)
    config.architectures = saved_as and [saved_as]
    assert auto_class(config) is expected
