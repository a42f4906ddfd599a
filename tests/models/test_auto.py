"""The auto class of a model follows what its checkpoint was saved as."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from lqer.models.auto import LARGE, auto_class, without_values


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


def test_a_stack_of_experts_is_built_without_memory_for_it():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.empty(LARGE, 1 << 16, 2))  # 32 TB
            self.down_proj = nn.Parameter(torch.empty((4, 2)))
            self.register_buffer("table", torch.arange(3.0))

    with without_values():
        experts = Experts()
    assert experts.gate_up_proj.is_meta
    assert experts.down_proj.is_meta
    assert torch.equal(experts.table, torch.tensor([0.0, 1.0, 2.0]))
