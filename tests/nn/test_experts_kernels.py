"""Tiny mixtures on the kernels: their logits beside those of emulation, and which experts are multiplied together.

On a machine without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from kernel_layers import DEVICE, DTYPE
from mixtures import random_mixture

import lqer
from lqer.checkpoint.experts import gate_of
from lqer.formats import Int, MXInt
from lqer.kernels import GroupedExperts, TritonLinear
from lqer.models.structure import prepare_model
from lqer.nn.experts import experts_of

GATES = {"mixtral": "silu", "qwen3_moe": "silu", "gpt_oss": ""}


@pytest.fixture(scope="module", params=GATES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def split(kind):
    model = copy.deepcopy(random_mixture(kind, num_hidden_layers=1))
    prepare_model(model)
    return model


@pytest.fixture
def loaded(split, plan, run_stages, monkeypatch):
    """The model by emulation in float32 and in the kernels' dtype, and by kernels."""

    def load(plan):
        checkpoint = run_stages(split, plan).checkpoint.path
        monkeypatch.setattr("lqer.checkpoint.backend.resolve_backend", lambda wanted, *_: wanted)
        backends = ((torch.float32, "emulate"), (DTYPE, "emulate"), (DTYPE, "triton"))
        return [lqer.load_quantized(checkpoint, DEVICE, dtype, backend) for dtype, backend in backends]

    return lambda **changes: load(replace(plan, **changes))


@torch.no_grad()
@pytest.mark.parametrize("formats", [{"weight": Int(4, 32)}, {"weight": MXInt(4), "activation": MXInt(8)}], ids=str)
def test_logits_of_kernels_are_as_exact_as_emulation(kind, loaded, formats, windows_WT):
    exact, emulation, kernels = loaded(**formats)
    ids_WT = windows_WT[:1, :3].to(DEVICE)
    expected, emulated, found = (model(ids_WT).logits.double() for model in (exact, emulation, kernels))
    # A token whose router hesitates may go elsewhere.
    assert (found - expected).norm() < max(1.5 * (emulated - expected).norm(), 0.02 * expected.norm())
    grouped = [module for module in kernels.modules() if isinstance(module, GroupedExperts)]
    assert [module.gate for module in grouped] == [GATES[kind]]
    assert not any(experts_of(block) for block in kernels.model.layers)


def test_activations_are_found_by_what_the_model_calls(kind, split):
    (experts,) = experts_of(split.model.layers[0]).values()
    assert gate_of(experts) == GATES[kind]


@torch.no_grad()
def test_experts_of_other_formats_are_multiplied_one_after_the_other(kind, split, plan, run_stages, monkeypatch):
    if kind != "mixtral":
        pytest.skip("the same for all")
    checkpoint = run_stages(split, plan, skip=("model.layers.0.mlp.experts.1.up_proj",)).checkpoint.path
    monkeypatch.setattr("lqer.checkpoint.backend.resolve_backend", lambda wanted, *_: wanted)
    model = lqer.load_quantized(checkpoint, DEVICE, DTYPE, "triton")
    (experts,) = experts_of(model.model.layers[0]).values()
    assert isinstance(experts.get_submodule("0.up_proj"), TritonLinear)
    assert model(torch.tensor([[3, 4]], device=DEVICE)).logits.isfinite().all()
