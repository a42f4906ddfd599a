from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig

from lqer.models.structure import find_blocks
from lqer.transforms.quarot import OnlineRotation, RotationError, attach, rotate_model

WIDTH = 32
ROTATED = ["llama", "mistral", "qwen3", "phi3"]
REFUSED = {
    "opt": "has a bias: only RMS norms can be rotated",
    "opt-350m": "lm_head does not read the output of a norm",
    "gpt-neox": "has a bias: only RMS norms can be rotated",
    "gpt2": "has a bias: only RMS norms can be rotated",
    "gemma3": "post_attention_layernorm scales channels that no linear reads: its gain cannot be folded away",
}


def orthogonal(x):
    """A random rotation of the last axis: nothing here may lean on the symmetry of a Hadamard matrix."""
    size = x.shape[-1]
    generator = torch.Generator().manual_seed(size)
    matrix, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return x @ matrix.to(x)


def rotate(model, windows_WT):
    _, blocks = find_blocks(model)
    return rotate_model(model, blocks, windows_WT[:2], orthogonal, orthogonal)


def relative_change(after, before):
    return float(torch.linalg.vector_norm(after - before) / torch.linalg.vector_norm(before))


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_the_logits_are_unchanged(random_model, windows_WT, name, tied):
    model = random_model(name, tie_word_embeddings=tied)
    embedding, before = model.get_input_embeddings().weight.clone(), model(windows_WT).logits
    online = rotate(model, windows_WT)
    assert relative_change(model(windows_WT).logits, before) < 1e-5
    assert relative_change(model.get_input_embeddings().weight, embedding) > 0.5
    assert len(online) == 2 * model.config.num_hidden_layers


@pytest.mark.parametrize("name", ROTATED)
@torch.no_grad()
def test_without_rotations_at_run_time_the_model_is_a_plain_one_with_the_same_logits(random_model, windows_WT, name):
    model = random_model(name)
    plain = copy.deepcopy(model)
    _, blocks = find_blocks(model)
    before = model(windows_WT).logits
    assert rotate_model(model, blocks, windows_WT[:2], orthogonal, orthogonal, online=False) == {}
    plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.clone())
    plain.load_state_dict(model.state_dict())
    assert relative_change(plain(windows_WT).logits, before) < 1e-5
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_without_rotations_at_run_time_values_are_rotated_head_by_head_and_the_mlp_inside_is_not(
    random_model, windows_WT
):
    model = random_model("llama")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gain_D = state["model.layers.0.post_attention_layernorm.weight"]
    _, blocks = find_blocks(model)
    rotate_model(model, blocks, windows_WT[:2], orthogonal, orthogonal, online=False)
    block = model.model.layers[0]
    down_DI = state["model.layers.0.mlp.down_proj.weight"]
    torch.testing.assert_close(block.mlp.down_proj.weight, orthogonal(down_DI.double().T).T.float())
    up_ID = state["model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(block.mlp.up_proj.weight, orthogonal(up_ID.double() * gain_D).float())
    # Two heads of eight values.
    value_HdD = (
        state["model.layers.0.self_attn.v_proj.weight"] * state["model.layers.0.input_layernorm.weight"]
    ).double()
    rotated_HdD = orthogonal(orthogonal(value_HdD).unflatten(0, (2, 8)).transpose(1, 2)).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(block.self_attn.v_proj.weight, rotated_HdD.float())


@torch.no_grad()
def test_a_gain_that_is_added_to_one_is_folded_and_the_scaled_embedding_rotated(windows_WT):
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GemmaConfig(vocab_size=80, num_key_value_heads=1, head_dim=16, initializer_range=0.2, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.normal_(0, 0.5)
    before = model(windows_WT).logits
    rotate(model, windows_WT)
    assert relative_change(model(windows_WT).logits, before) < 1e-5
    assert not model.model.norm.weight.any()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rotated_is_refused_with_the_reason_and_left_alone(random_model, windows_WT, name):
    model = random_model(name)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(RotationError, match=REFUSED[name]):
        rotate(model, windows_WT)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_layer_norm_without_bias_is_refused_too(random_model, windows_WT):
    model = random_model("llama")
    for block in model.model.layers:
        block.input_layernorm = nn.LayerNorm(WIDTH, bias=False)
    with pytest.raises(RotationError, match=r"input_layernorm \(LayerNorm\) does not commute with rotations"):
        rotate(model, windows_WT)


def test_a_model_that_adds_to_the_stream_elsewhere_is_refused(random_model, windows_WT):
    model = random_model("llama")
    bias = torch.randn(WIDTH)
    model.model.layers[0].register_forward_hook(lambda _, args, output: output + bias)
    with pytest.raises(RotationError, match=r"the rotation changes the logits of LlamaForCausalLM by"):
        rotate(model, windows_WT)


@torch.no_grad()
def test_gains_are_ones_afterwards_and_the_head_is_untied(random_model, windows_WT):
    model = random_model("llama", tie_word_embeddings=True)
    rotate(model, windows_WT)
    norms = [tensor for name, tensor in model.named_parameters() if name.endswith("norm.weight")]
    assert len(norms) == 5
    assert all(torch.equal(norm, torch.ones_like(norm)) for norm in norms)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert model.config.tie_word_embeddings is False


@torch.no_grad()
def test_values_are_rotated_head_by_head_in_the_weights(random_model, windows_WT):
    model = random_model("llama")
    block, seen = model.model.layers[0], []
    block.self_attn.v_proj.register_forward_hook(lambda _, args, output: seen.append(output))
    model(windows_WT)
    rotate(model, windows_WT)
    seen = seen[:1]
    block.self_attn.v_proj.register_forward_hook(lambda _, args, output: seen.append(output))
    model(windows_WT)
    heads = seen[0].unflatten(-1, (2, 8))
    torch.testing.assert_close(seen[1], orthogonal(heads).flatten(-2), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_outliers_are_spread(random_model, windows_WT):
    model = random_model("llama")
    model.model.embed_tokens.weight[:, 5] *= 30
    hidden = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    model(windows_WT)
    rotate(model, windows_WT)
    model(windows_WT)

    def peak(x):
        return float(x.abs().amax(-1).mean() / x.square().mean(-1).sqrt().mean())

    assert peak(hidden[-1]) < 0.5 * peak(hidden[0])


def test_an_online_rotation_across_heads_mixes_equal_channels_of_all_heads():
    x = torch.randn(2, 12)
    expected = torch.stack([orthogonal(x[:, channel::4]) for channel in range(4)], dim=-1).flatten(1)
    torch.testing.assert_close(OnlineRotation(orthogonal, heads=3)(x), expected)


def test_online_rotations_keep_the_dtype_and_can_be_taken_off():
    linear, x = nn.Linear(6, 2, dtype=torch.bfloat16), torch.randn(4, 6, dtype=torch.bfloat16)
    plain = linear(x)
    handle = attach(linear, OnlineRotation(orthogonal))
    assert linear(x).dtype == torch.bfloat16
    assert not torch.equal(linear(x), plain)
    handle.remove()
    assert torch.equal(linear(x), plain)
