"""`finetune.parts`: which tensors of a checkpoint are trained, under which names, at which rates.

Shapes: W windows, T tokens.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lqer.checkpoint.load import load_quantized
from lqer.config.schema import TrainingConfig
from lqer.formats import E8P, Int, MXInt, Passthrough
from lqer.methods import QeraExact
from lqer.store.names import block_file
from lqer.training.parts import learning_rates, trained_tensors
from lqer.transforms import Hadamard

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(random_model, run_stages, plan):
    """A model with biases and two kinds of norms; integers in groups, A and B in float16."""
    plan = replace(plan, method=QeraExact(), weight=Int(3, block_size=16), factor=Passthrough("float16"), rank=4)
    return run_stages(random_model("gpt-neox"), plan)


@pytest.fixture(scope="module")
def rotated(random_model, run_stages, plan):
    plan = replace(plan, method=QeraExact(), weight=E8P(2), factor=MXInt(8), transform=Hadamard(), rank=16)
    return run_stages(random_model("qwen3"), plan)


def student_of(stages, *parts):
    stored = {}
    for file in (block_file(0), block_file(1), "outside.safetensors"):
        stored |= stages.checkpoint.tensors(file)
    model = load_quantized(stages.checkpoint.path, CPU).requires_grad_(False)
    return model, trained_tensors(model, stages.details["linears"], stored, TrainingConfig(parts=parts)), stored


def endings(trained) -> set[str]:
    return {name.split(".", 3)[-1] if name.startswith("gpt_neox.layers") else name for name in trained}


def test_norms_are_every_vector_outside_the_linears(checkpoint):
    _, trained, _ = student_of(checkpoint, "norms")
    final = {"gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias"}
    names = ("input_layernorm", "post_attention_layernorm")
    inside = {f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")}
    assert endings(trained) == inside | final
    assert {one.kind for one in trained.values()} == {"norms"}


def test_scales_are_those_of_the_weights(checkpoint, rotated):
    for stages in (checkpoint, rotated):
        _, trained, _ = student_of(stages, "scales")
        assert {*trained} == {f"{linear}.weight.scales" for linear in stages.details["linears"]}
        assert {one.kind for one in trained.values()} == {"scales"}


def test_floats_are_all_that_is_stored_in_floating_point(checkpoint):
    _, trained, stored = student_of(checkpoint, "floats")
    floats = {name for name, tensor in stored.items() if tensor.is_floating_point()}
    assert {*trained} == floats - {"gpt_neox.embed_in.weight", "lm_head.weight"}
    assert {name: one.stored(one.parameter).dtype for name, one in trained.items()} == {
        name: stored[name].dtype for name in trained
    }


def test_factors_are_left_to_low_rank_where_that_is_trained_too(rotated):
    _, trained, _ = student_of(rotated, "floats", "low_rank", "rht_signs")
    kinds = [one.kind for one in trained.values()]
    linears = len(rotated.details["linears"])
    assert kinds.count("low_rank") == kinds.count("signs") == 2 * linears
    assert kinds.count("scales") == linears
    assert "factors" not in kinds


@pytest.mark.parametrize("parts", [("norms",), ("scales",), ("floats",), ("floats", "rht_signs", "low_rank")])
def test_the_model_computes_the_same_before_the_first_step_and_every_tensor_has_a_gradient(
    checkpoint, rotated, windows_WT, parts
):
    for stages in (checkpoint, rotated):
        expected = load_quantized(stages.checkpoint.path, CPU)(windows_WT).logits
        model, trained, _ = student_of(stages, *parts)
        for one in trained.values():
            one.train()
        logits = model(windows_WT).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=0)
        logits.square().sum().backward()
        assert [name for name, one in trained.items() if one.parameter.grad is None] == []
        assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
            name for name, parameter in model.named_parameters() if parameter.grad is not None
        ]


def test_every_kind_has_a_rate_of_its_own():
    settings = TrainingConfig(parts=("floats",), norm_learning_rate=2e-3, scale_learning_rate=3e-3)
    rates = learning_rates(settings)
    assert (rates["norms"], rates["scales"], rates["signs"]) == (2e-3, 3e-3, settings.learning_rate)
