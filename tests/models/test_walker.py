"""The walk through the decoder blocks against the model's own forward pass."""

from __future__ import annotations

import pytest
import torch
from helpers import build_gemma4, resident, walk
from torch import Tensor, nn

from lqer.errors import ModelError
from lqer.models.structure import find_blocks
from lqer.models.walker import walk_blocks


@torch.no_grad()
def test_walked_states_through_the_rest_of_the_model_give_its_logits(architecture, random_model, windows_WT):
    model = random_model(architecture)
    walked = walk(model, windows_WT)
    blocks = find_blocks(model)[1]
    assert len(walked) == 3
    for ids_BT, output in zip(windows_WT.split(2), walked, strict=True):
        own_logits = model(ids_BT).logits
        hook = blocks[-1].register_forward_hook(lambda block, args, own, walked=output: walked)
        # The model's own states are destroyed on the way, so that only the walked ones can explain its logits.
        ruin = blocks[0].register_forward_pre_hook(lambda block, args: (torch.zeros_like(args[0]), *args[1:]))
        assert torch.equal(model(ids_BT).logits, own_logits)
        hook.remove()
        ruin.remove()


@torch.no_grad()
def test_keys_and_values_that_blocks_share_are_handed_on_batch_by_batch(windows_WT):
    model = build_gemma4(shared=3)
    opened = resident(model)
    outputs: list[Tensor] = []
    opened.blocks[-1].register_forward_hook(lambda block, args, output: outputs.append(output.clone()))
    runs = walk_blocks(opened, windows_WT, 2)
    for run in runs:
        # A look at an output leaves what blocks have handed on as it is.
        run.output(0)
        run.forward()
    del outputs[0]
    walked = outputs.copy()
    for ids_BT, output_BTD in zip(windows_WT.split(2), walked, strict=True):
        model(ids_BT, use_cache=False)
        torch.testing.assert_close(output_BTD, outputs[-1], rtol=1e-5, atol=1e-6)


def test_a_walk_leaves_the_model_as_it_was(random_model, windows_WT):
    model = random_model("llama")
    blocks = list(model.model.layers)
    own_logits = model(windows_WT).logits
    walk(model, windows_WT)
    assert all(a is b for a, b in zip(model.model.layers, blocks, strict=True))
    assert torch.equal(model(windows_WT).logits, own_logits)


def test_blocks_are_put_back_when_the_model_cannot_be_walked(random_model, windows_WT):
    model = random_model("llama")
    blocks = list(model.model.layers)
    with pytest.raises(
        ModelError, match="LlamaForCausalLM cannot be run block by block: IndexError: index out of range"
    ):
        walk(model, windows_WT + model.config.vocab_size)
    assert all(a is b for a, b in zip(model.model.layers, blocks, strict=True))


def test_an_output_that_is_not_stored_leaves_the_hidden_states_as_they_are(random_model, windows_WT):
    runs = walk_blocks(resident(random_model("llama")), windows_WT, 2)
    run = next(runs)
    states_WTD = run.hidden.states_WTD.clone()
    outputs = [run.output(batch) for batch in range(3)]
    assert torch.equal(run.hidden.states_WTD, states_WTD)
    run.forward()
    assert torch.equal(run.hidden.states_WTD, torch.cat(outputs))


def test_changes_to_a_block_reach_the_next_one(random_model, windows_WT):
    model = random_model("llama")
    opened = resident(model)
    inputs: list[Tensor] = []
    # Cloned: the states are overwritten on their way.
    opened.blocks[1].register_forward_pre_hook(lambda block, args: inputs.append(args[0].clone()))
    for run in walk_blocks(opened, windows_WT, 5):
        if run.index == 0:
            for parameter in run.block.parameters():
                nn.init.zeros_(parameter)
        run.forward()
    # A block of zeros adds nothing to its residual stream.
    assert torch.equal(inputs[0], model.model.embed_tokens(windows_WT))


@pytest.mark.parametrize("name", [
    "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight",
    "model.layers.0.input_layernorm.weight",
])  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_parameter_that_is_not_finite_is_named_with_its_dtype(random_model, windows_WT, name, value):
    model = random_model("llama").to(torch.bfloat16)
    model.get_parameter(name).data.view(-1)[3] = value
    with pytest.raises(ModelError, match=rf"model: {name} holds NaN or infinities \(in bfloat16\)"):
        walk(model, windows_WT)
