"""Rescaling a demo model keeps its function and its norms, and takes its weights off their grid."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import tiny_llama
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lqer.models import demo_expand
from lqer.models.demo_expand import rescale_


def on_a_grid(model: LlamaForCausalLM | Qwen2ForCausalLM) -> LlamaForCausalLM | Qwen2ForCausalLM:
    """Norms with gains, biases if the model has any, and linears on a 4-bit grid in blocks of 32."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in [*model.model.layers.named_parameters(), ("norm", model.model.norm.weight)]:
            if "norm" in name:
                parameter.uniform_(0.3, 3.0, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(generator=generator)
            else:
                parameter.copy_(torch.randint(-8, 8, parameter.shape, generator=generator) * 0.01)
    return model


def llama() -> LlamaForCausalLM:
    """Two blocks with grouped queries and a tied head."""
    settings = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "tie_word_embeddings": True}
    return on_a_grid(tiny_llama(**settings))


def qwen2() -> Qwen2ForCausalLM:
    """Two blocks with grouped queries, biases of q, k and v, and a head of its own."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=257, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    return on_a_grid(Qwen2ForCausalLM(config).eval())


both = pytest.mark.parametrize("build", [llama, qwen2])


def distinct_values(weight: torch.Tensor) -> int:
    """The fewest distinct values in a block of 32 along the inputs."""
    return min(len(block.unique()) for block in weight.detach().reshape(-1, 32))


@both
def test_the_function_stays(build):
    model, ids = build(), torch.arange(48).view(2, 24)
    with torch.no_grad():
        before = model(ids).logits
        rescale_(model, seed=0)
        after = model(ids).logits
    assert (after - before).norm() / before.norm() < 1e-5


@both
def test_no_linear_stays_on_the_grid(build):
    model = build()
    linears = {name: module for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(linears) == 14
    assert all(distinct_values(linear.weight) <= 16 for linear in linears.values())
    rescale_(model, seed=0)
    for name, linear in linears.items():
        assert distinct_values(linear.weight) > 16, name


@both
def test_norms_stay_as_trained_but_for_the_random_gains(build):
    model = build()
    norms = {name: weight for name, weight in model.named_parameters() if "norm" in name}
    before = {name: weight.detach().clone() for name, weight in norms.items()}
    rescale_(model, seed=0)
    for name, weight in norms.items():
        ratio = before[name] / weight
        if name == "model.norm.weight" and model.config.tie_word_embeddings:
            assert torch.equal(weight, before[name])
        else:
            assert 0.84 < ratio.min() < 0.9 < 1.1 < ratio.max() < 1.2


def test_the_embedding_stays_and_a_head_of_its_own_is_rescaled():
    model = qwen2()
    embedding, head = model.model.embed_tokens.weight.detach().clone(), model.lm_head.weight.detach().clone()
    rescale_(model, seed=0)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    ratio_VD = model.lm_head.weight / head
    assert torch.allclose(ratio_VD, ratio_VD[0].expand_as(ratio_VD))
    assert 0.84 < ratio_VD.min() < 0.9 < 1.1 < ratio_VD.max() < 1.2


def test_gains_are_exact():
    gains = demo_expand.channel_gains(10_000, torch.Generator().manual_seed(3))
    assert gains.dtype == torch.float32
    assert torch.equal(gains * 1024, (gains * 1024).round())
    assert 0.84 < gains.min() < gains.max() < 1.2


@both
def test_a_tied_head_is_written_once_and_one_of_its_own_too(build, tmp_path):
    model = build()
    demo_expand.save_model(model, tmp_path, "bfloat16")
    stored = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in stored) != model.config.tie_word_embeddings
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == ([type(model).__name__], "bfloat16")
    loaded, found = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.to(torch.bfloat16))
