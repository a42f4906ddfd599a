"""Whether a model can be run block by block is known without its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from campaigns.tiny import build
from helpers import build_gemma4
from mixtures import random_mixture
from torch import nn
from transformers import BartConfig, BartForCausalLM, modeling_utils
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lqer.errors import ModelError
from lqer.models.probe import check_walk
from lqer.models.source import ModelSource, resolve_model


@pytest.fixture
def source(random_model, tmp_path) -> ModelSource:
    random_model("llama").save_pretrained(tmp_path)
    return resolve_model(str(tmp_path))


def test_every_family_can_be_walked(architecture, random_model, tmp_path):
    random_model(architecture).save_pretrained(tmp_path)
    assert check_walk(resolve_model(str(tmp_path)), whole_blocks=True) == []


def test_a_model_whose_blocks_are_called_by_the_batch_is_refused_for_transforms_of_whole_blocks_alone(tmp_path):
    build_bloom(tmp_path)
    source = resolve_model(str(tmp_path))
    check_walk(source, whole_blocks=False)
    with pytest.raises(ModelError, match="arguments that depend on the batch"):
        check_walk(source, whole_blocks=True)


def build_bloom(folder: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(vocab_size=80, hidden_size=32, n_layer=2, n_head=4)).save_pretrained(folder)


def test_a_block_that_fails_alone_is_reported_in_one_line(source, monkeypatch):
    def fail(self, *arguments, **named):
        raise RuntimeError("it broke\nin two lines")

    monkeypatch.setattr(LlamaDecoderLayer, "forward", fail)
    with pytest.raises(ModelError, match="cannot be run block by block: RuntimeError: it broke in two lines"):
        check_walk(source, whole_blocks=False)


def test_a_block_that_gives_other_outputs_on_its_own_is_refused(source, monkeypatch):
    forward, passes = LlamaDecoderLayer.forward, []

    def stateful(self, *arguments, **named):
        passes.append(self)
        return forward(self, *arguments, **named) + len(passes)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", stateful)
    with pytest.raises(ModelError, match=r"model\.layers\.0 of LlamaForCausalLM gives other hidden states"):
        check_walk(source, whole_blocks=False)


@pytest.mark.parametrize("shared", [0, 2])
def test_blocks_that_read_keys_and_values_of_others_are_walked_but_not_transformed_as_a_whole(tmp_path, shared):
    build_gemma4(shared).save_pretrained(tmp_path)
    source = resolve_model(str(tmp_path))
    check_walk(source, whole_blocks=False)
    if shared:
        with pytest.raises(ModelError, match="or keys and values of other blocks"):
            check_walk(source, whole_blocks=True)
        with pytest.raises(ModelError, match="leave values for later ones, through which no gradients flow"):
            check_walk(source, whole_blocks=False, gradients=True)


@pytest.mark.parametrize(("kind", "wrapper"), [("deepseek_v4", False), ("hy_v4", False), ("glm5_next", True)])
def test_blocks_between_which_a_token_has_several_streams_are_walked(tmp_path, kind, wrapper):
    build(tmp_path, kind, wrapper=wrapper)
    assert check_walk(resolve_model(str(tmp_path)), whole_blocks=False) == []


def test_blocks_that_attend_to_tokens_which_another_has_chosen_are_walked_but_not_transformed_as_a_whole(tmp_path):
    build(tmp_path, "hy_v4", indexer_types=["full", "shared", "shared", "full"], index_topk=3)
    source = resolve_model(str(tmp_path))
    check_walk(source, whole_blocks=False, gradients=True)
    with pytest.raises(ModelError, match="arguments that depend on the batch"):
        check_walk(source, whole_blocks=True)


def test_blocks_that_choose_their_own_tokens_are_transformed_as_a_whole(tmp_path):
    build(tmp_path, "glm_moe_dsa", index_topk=3)
    check_walk(resolve_model(str(tmp_path)), whole_blocks=True)


def test_linears_that_no_text_reaches_are_returned(tmp_path):
    config = BartConfig(
        vocab_size=80, d_model=32, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=64, encoder_layers=1,
        encoder_ffn_dim=64, encoder_attention_heads=2, is_decoder=True, is_encoder_decoder=False,
    )  # fmt: skip
    BartForCausalLM(config).save_pretrained(tmp_path)
    unreached = check_walk(resolve_model(str(tmp_path)), whole_blocks=False)
    names = ("k_proj", "out_proj", "q_proj", "v_proj")
    assert sorted(unreached) == [f"model.decoder.layers.{i}.encoder_attn.{name}" for i in (0, 1) for name in names]


def test_experts_for_images_alone_are_reached_by_no_text(tmp_path):
    build(tmp_path, "ernie4_5_vl_moe", wrapper=True)
    unreached = check_walk(resolve_model(str(tmp_path)), whole_blocks=False)
    # The first block has no experts.
    assert sorted(unreached) == [
        f"model.language_model.layers.{block}.mlp.vision_moe.experts.{expert}.{name}"
        for block in (1, 2, 3) for expert in range(4) for name in ("down_proj", "gate_proj", "up_proj")
    ]  # fmt: skip


def test_weights_are_not_read(source, monkeypatch):
    (Path(source.path) / "model.safetensors").unlink()
    check_walk(source, whole_blocks=True)


def test_tied_weights_are_one_so_that_transformers_warns_of_nothing(random_model, tmp_path, monkeypatch):
    random_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    warnings: list[str] = []
    monkeypatch.setattr(modeling_utils.logger, "warning", lambda message, *_: warnings.append(message))
    check_walk(resolve_model(str(tmp_path)), whole_blocks=False)
    assert warnings == []


def test_a_matrix_takes_the_memory_of_a_vector(source, monkeypatch):
    stored: list[int] = []
    run = LlamaDecoderLayer.forward

    def measured(self, *arguments, **named):
        stored.extend(p.untyped_storage().nbytes() for p in self.parameters() if p.ndim == 2)
        return run(self, *arguments, **named)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", measured)
    check_walk(source, whole_blocks=False)
    assert isinstance(nn.Linear(64, 32).weight, nn.Parameter)
    assert max(stored) <= 4 * (64 + 32 + 1)


def test_experts_outside_of_the_registry_that_compute_something_else_are_refused(tmp_path, monkeypatch):
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    random_mixture("llama4_text").save_pretrained(tmp_path)
    source = resolve_model(str(tmp_path))
    assert check_walk(source, whole_blocks=False) == []
    forward = Llama4TextExperts.forward
    monkeypatch.setattr(Llama4TextExperts, "forward", lambda self, hidden_states: 2 * forward(self, hidden_states))
    with pytest.raises(ModelError, match=r"feed_forward\.experts is a Llama4TextExperts, whose experts compute"):
        check_walk(source, whole_blocks=False)
