"""The auto class of a model follows what its checkpoint was saved as."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, initialization

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


def test_parameters_without_values_are_not_initialized_and_buffers_are():
    """By torch's functions and by those that transformers puts in their place."""

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4, 2))
            self.register_buffer("table", torch.empty(3))
            for fill in (nn.init.zeros_, nn.init.normal_, initialization.normal_):
                assert fill(self.weight) is self.weight
            nn.init.constant_(self.table, 2.0)
            initialization.copy_(self.table[:1], torch.tensor([1.0]))

    with without_values(), NoNormalValues():
        mixer = Mixer()
    assert mixer.weight.is_meta
    assert torch.equal(mixer.table, torch.tensor([1.0, 2.0, 2.0]))


class NoNormalValues(TorchDispatchMode):
    """Refuses the work of drawing values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "normal" not in func.name(), func.name()
        return func(*args, **(kwargs or {}))


def test_a_model_built_without_values_has_the_buffers_of_one_with(random_model):
    config = random_model("llama").config
    with without_values():
        built = AutoModelForCausalLM.from_config(config)
    expected = dict(AutoModelForCausalLM.from_config(config).named_buffers())
    assert expected
    assert all(torch.equal(buffer, expected[name]) for name, buffer in built.named_buffers())
    assert all(parameter.is_meta for parameter in built.parameters())
