"""A model's outline against the model itself, and a configuration's patterns against the summary."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from typing import Any

import pytest
from campaigns.tiny import build
from transformers import AutoModelForCausalLM, JetMoeConfig

from lqer.config import Config
from lqer.config.plan import plan_model
from lqer.errors import ConfigError, ModelError
from lqer.formats import Trellis
from lqer.models.source import resolve_model
from lqer.models.structure import block_linears, find_blocks
from lqer.models.summary import ModelSummary, summarize_model

SUMMARY = ModelSummary(
    architecture="LlamaForCausalLM",
    parameters=100,
    blocks_name="model.layers",
    blocks=2,
    linears={f"model.layers.{i}.mlp.{name}": (4, 4) for i in range(2) for name in ("up_proj", "down_proj")},
    outside=("lm_head",),
    attention_is_registered=True,
    block_parameters=32,
    outside_parameters=36,
    hidden_size=4,
    vocabulary=9,
    embedded_ids=10,
    max_positions=64,
    learnt_positions=False,
)


def config(**quantize: Any) -> Config:
    formats = {"w4": {"kind": "mxint", "bits": 4}, "w8": {"kind": "mxint", "bits": 8}}
    return Config.model_validate(
        {"model": "m", "tag": "t", "formats": formats, "quantize": {"weight": "w4", **quantize}}
    )


def test_the_outline_is_that_of_the_model(architecture, random_model, tmp_path):
    model = random_model(architecture)
    # As it came, before its Conv1D were replaced.
    AutoModelForCausalLM.from_config(model.config).save_pretrained(tmp_path)
    summary = summarize_model(resolve_model(str(tmp_path)))
    name, blocks = find_blocks(model)
    assert (summary.architecture, summary.blocks_name, summary.blocks) == (type(model).__name__, name, len(blocks))
    assert summary.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert summary.linears == {
        f"{name}.{i}.{linear_name}": tuple(linear.weight.shape)
        for i, block in enumerate(blocks)
        for linear_name, linear in block_linears(block).items()
    }
    projections = ("model.decoder.project_out", "model.decoder.project_in") if architecture == "opt-350m" else ()
    assert summary.outside == (*projections, "lm_head")


def test_a_token_has_the_values_of_all_its_streams_between_blocks(tmp_path):
    build(tmp_path, "hy_v4", hc_mult=2)
    assert summarize_model(resolve_model(str(tmp_path))).hidden_size == 2 * 64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_linears_that_transformers_keeps_in_float32_are_not_quantized_whatever_the_dtype(tmp_path, dtype):
    """Those of bfloat16 (HY-V4), and of float16 alone (GLM-5)."""
    for kind in ("hy_v4", "glm_moe_dsa"):
        build(tmp_path / kind, kind)
        config = json.loads((tmp_path / kind / "config.json").read_text())
        (tmp_path / kind / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
        summary = summarize_model(resolve_model(str(tmp_path / kind)))
        assert "model.layers.0.self_attn.indexer.weights_proj" in summary.outside
        assert "model.layers.0.self_attn.indexer.wk" in summary.linears


def test_what_cannot_be_quantized_is_refused_before_any_weight_is_read(tmp_path):
    JetMoeConfig(num_hidden_layers=1, num_local_experts=2).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"as model\.layers\.0\.mlp\.input_linear\.weight of JetMoeParallelExperts"):
        summarize_model(resolve_model(str(tmp_path)))


def test_a_model_that_is_no_language_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="is not a causal language model"):
        summarize_model(resolve_model(str(tmp_path)))


def test_skipped_linears_have_no_plan():
    plans = plan_model(config(skip=["*.1.*"]), SUMMARY)
    assert {name for name, plan in plans.items() if plan is None} == {
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    }


@pytest.mark.parametrize(
    ("quantize", "key", "hint"),
    [
        ({"skip": ["*.up_porj"]}, "quantize.skip.0: '*.up_porj'", "up_proj"),
        ({"skip": ["lm_head", "lm_haed"]}, "quantize.skip.1: 'lm_haed'", "lm_head"),
        (
            {"override": [{"match": "*.dwon_proj", "weight": "w8"}]},
            "quantize.override.0.match: '*.dwon_proj'",
            "down_proj",
        ),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(quantize, key, hint):
    with pytest.raises(ConfigError) as error:
        plan_model(config(**quantize), SUMMARY)
    assert str(error.value).startswith(f"{key} matches no linear of LlamaForCausalLM")
    assert f"did you mean '{hint}'?" in str(error.value)


def test_an_override_of_what_is_never_quantized_is_refused():
    with pytest.raises(ConfigError, match=r"quantize\.override\.0\.match: 'lm_head' matches no linear"):
        plan_model(config(override=[{"match": "lm_head", "weight": "w8"}]), SUMMARY)


def test_a_shape_that_a_format_has_no_codes_for_is_refused_before_the_run():
    odd = replace(SUMMARY, blocks_name="layers", blocks=1, linears={"layers.0.dense": (48, 40)}, outside=())
    settings = config(weight="t2").model_copy(update={"formats": {"t2": Trellis(2)}})
    with pytest.raises(ConfigError, match=r"layers\.0\.dense .*, and the matrix is 48 x 40 \(trellis\)"):
        plan_model(settings, odd)


def test_the_head_may_be_skipped_where_there_is_none():
    headless = replace(SUMMARY, blocks_name="layers", blocks=1, linears={"layers.0.dense": (4, 4)}, outside=())
    assert plan_model(config(skip=["lm_head"]), headless)["layers.0.dense"] is not None


def test_skipping_everything_is_refused():
    with pytest.raises(ConfigError, match="all linears are skipped"):
        plan_model(config(skip=["*"]), SUMMARY)


def test_quantized_attention_is_refused_where_a_model_computes_attention_by_itself():
    by_itself = dataclasses.replace(SUMMARY, attention_is_registered=False)
    assert any(plan_model(config(), by_itself).values())
    with pytest.raises(ConfigError, match=r"quantize\.attention: must be 'none' for LlamaForCausalLM"):
        plan_model(config(attention="w8"), by_itself)


@pytest.mark.parametrize(
    ("architecture", "learnt"), [("llama", False), ("gpt2", True), ("opt", True), ("opt-350m", True), ("phi3", False)]
)
def test_a_table_of_positions_is_told_from_rotary_positions(random_model, tmp_path, architecture, learnt):
    random_model(architecture).save_pretrained(tmp_path)
    summary = summarize_model(resolve_model(str(tmp_path)))
    assert (summary.max_positions, summary.learnt_positions) == (64, learnt)
