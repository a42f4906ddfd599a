"""A wrapper's language model is quantized; its towers and projections are not, and do not count against it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedModel, WhisperConfig, WhisperForCausalLM

from lqer.models.structure import find_blocks
from lqer.models.wrappers import beside_the_language_model

TEXT = {
    "vocab_size": 80, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
SIZES = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 256}
# Towers of more blocks than the language model has.
LLAVA = {
    "text_config": {"model_type": "llama", **TEXT},
    "vision_config": {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **SIZES},
}


@pytest.fixture(scope="module")
def llava() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForMultimodalLM.from_config(AutoConfig.for_model("llava", **LLAVA))


def test_blocks_are_those_of_the_language_model_however_large_a_tower_is(llava):
    assert find_blocks(llava)[0] == "model.language_model.layers"


def test_towers_and_projections_stand_beside_the_language_model(llava):
    beside = beside_the_language_model(llava)
    linears = [name for name, module in llava.named_modules() if isinstance(module, nn.Linear)]
    kept = {name for name in linears if f"{name}.".startswith(beside)}
    assert "model.multi_modal_projector.linear_1" in kept
    assert any(name.startswith("model.vision_tower.") for name in kept)
    assert {name for name in linears if ".language_model." in name}.isdisjoint(kept)
    assert "lm_head" not in kept


def test_a_decoder_is_the_language_model_whatever_its_main_input_is():
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "vocab_size": 80}
    model = WhisperForCausalLM(WhisperConfig(**sizes, pad_token_id=0, bos_token_id=0, eos_token_id=0))
    assert find_blocks(model)[0] == "model.decoder.layers"


def test_a_language_model_has_nothing_beside_it(random_model):
    assert beside_the_language_model(random_model("llama")) == ()
    assert beside_the_language_model(nn.Linear(2, 2)) == ()
