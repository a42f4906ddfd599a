"""Every configuration that ships can be read, and templates say nothing that a preset already says."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli
import torch
from campaigns.tiny import build
from mixtures import random_mixture
from reference.codebook_bits import codebook_storage_bits

from lqer.config import plan_linear, read_config
from lqer.config.plan import plan_model
from lqer.methods import Caldera
from lqer.models.probe import check_walk
from lqer.models.source import resolve_model
from lqer.models.summary import summarize_model
from lqer.nn.attention import QuantizedAttention, quantize_attention

CONFIGS = Path(__file__).parents[2] / "configs"
TEMPLATES = sorted((CONFIGS / "template").glob("*.toml"))
FOLDERS_OF_PARTS = ("finetune", "formats", "methods", "protocols")
PARTS = sorted(path for folder in FOLDERS_OF_PARTS for path in (CONFIGS / folder).glob("*.toml"))
PAPER = sorted((CONFIGS / "paper").glob("*.toml"))
NAMED_BY_LQER = [
    *(f"opt-{size}" for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b")),
    *(f"llama-{size}" for size in ("7b", "13b", "30b", "65b")),
    *(f"llama-2-{size}" for size in ("7b", "13b", "70b")),
    *("tinyllama-1.1b", "mistral-7b", "vicuna-7b-v1.5", "vicuna-13b-v1.5"),
]
# By template: the tiny model that stands for it.
MIXTURE_OF = {
    "gpt-oss-20b": "gpt_oss",
    "qwen3-30b-a3b": "qwen3_moe",
    "deepseek-v2-lite": "deepseek_v2",
    "deepseek-v4-flash": "deepseek_v4",
    "glm-4.5-air": "glm4_moe",
}
NEWER = ["llama-3.1-8b", "llama-3.2-1b", "llama-3.2-3b", "qwen3-0.6b", "qwen3-1.7b", "qwen3-8b", "gemma-3-1b"]
# By template: the architecture, whether with its towers, and a linear that only such a model has.
HYBRIDS_AND_WRAPPERS = {
    "qwen3.5-27b": ("qwen3_5", True, "model.language_model.layers.0.linear_attn.out_proj"),
    "qwen3.5-35b-a3b": ("qwen3_5_moe", True, "model.language_model.layers.0.mlp.experts.3.down_proj"),
    "gemma-4-e2b": ("gemma4", True, "model.language_model.layers.0.per_layer_input_gate"),
    "granite-4.0-h-tiny": ("granitemoehybrid", False, "model.layers.0.mamba.in_proj"),
}


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_is_a_whole_experiment(path):
    config = read_config(path)
    plan = plan_linear(config, "model.layers.0.self_attn.q_proj")
    assert (plan.weight.bits, plan.activation.bits, plan.rank) == (4, 8, 32)
    assert config.evaluation.perplexity is not None
    assert config.tag.startswith(path.stem)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_holds_only_what_its_model_needs(path):
    assert set(tomli.loads(path.read_text())) == {"extends", "model", "tag"}


@pytest.mark.parametrize("name", [*NAMED_BY_LQER, *NEWER, *MIXTURE_OF, *HYBRIDS_AND_WRAPPERS, "smollm2-135m"])
def test_there_is_a_template_for(name):
    assert (CONFIGS / "template" / f"{name}.toml") in TEMPLATES


@pytest.mark.parametrize("name", MIXTURE_OF)
def test_a_template_of_a_mixture_fits_a_model_of_its_architecture(name, tmp_path, windows_WT):
    model = random_mixture(MIXTURE_OF[name])
    model.save_pretrained(tmp_path)
    config = read_config(CONFIGS / "template" / f"{name}.toml", overrides=[f"--model={tmp_path}"])
    plans = plan_model(config, summarize_model(resolve_model(str(tmp_path))))
    experts = [plan for linear, plan in plans.items() if ".experts." in linear]
    assert len(experts) == 3 * 4 * sum(key.endswith("experts.gate_up_proj") for key, _ in model.named_parameters())
    assert all(plan is not None and plan.rank == 32 for plan in plans.values())
    attention = QuantizedAttention(config.formats[config.quantize.attention], config.quantize.attention_axis)
    quantize_attention(model, attention)
    with torch.no_grad():
        assert torch.isfinite(model(windows_WT).logits).all()


@pytest.mark.parametrize("name", HYBRIDS_AND_WRAPPERS)
def test_a_template_of_a_hybrid_or_wrapper_fits_a_model_of_its_architecture(name, tmp_path):
    kind, with_towers, linear = HYBRIDS_AND_WRAPPERS[name]
    build(tmp_path, kind, wrapper=with_towers)
    config = read_config(CONFIGS / "template" / f"{name}.toml", overrides=[f"--model={tmp_path}"])
    source = resolve_model(str(tmp_path))
    plans = plan_model(config, summarize_model(source))
    assert linear in plans
    assert all(plan is not None and plan.rank == 32 for plan in plans.values())
    check_walk(source, whole_blocks=False)


@pytest.mark.parametrize("path", PARTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_part_makes_an_experiment_once_model_and_weight_are_named(path, tmp_path):
    child = tmp_path / "child.toml"
    parents = [str(CONFIGS / "formats/mxint.toml"), str(path)]
    weight = "" if path.parent.name == "methods" and path.stem != "protocol" else '[quantize]\nweight = "w4"\n'
    weight += 'transforms = ["hadamard"]\n' if path.stem.endswith("-signs") else ""
    child.write_text(f'extends = {parents}\nmodel = "some/model"\n{weight}')
    config = read_config(child)
    assert config.quantize.weight in config.formats


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_a_row_of_a_paper_is_a_whole_experiment(path):
    config = read_config(path)
    assert plan_linear(config, "model.layers.0.self_attn.q_proj") is not None
    assert config.evaluation.perplexity is not None
    assert config.tag.startswith(path.stem)


@pytest.mark.parametrize("path", [path for path in PAPER if path.stem.startswith("gptvq-")], ids=lambda path: path.stem)
def test_a_row_of_gptvq_has_the_bits_and_the_dimension_of_its_name(path):
    _, dimension, bits = path.stem.split("-")
    config = read_config(path)
    assert config.quantize.propagates_error
    assert (config.calibration.num_samples, config.calibration.seq_len) == (128, 2048)
    plan = plan_linear(config, "model.layers.0.self_attn.q_proj")
    assert f"{plan.weight.dimension}d" == dimension
    scales = 16 / plan.weight.group_size
    assert plan.weight.bits_per_value(4096) - scales == float(bits)
    stored = codebook_storage_bits(plan.weight, (4096, 4096))
    assert sum(stored.values()) / 4096**2 - scales == pytest.approx(float(bits), abs=1e-9)


@pytest.mark.parametrize(
    ("name", "rank", "factor_bits", "down_date", "rotated"),
    [
        ("r64-4bit", 64, 4, 1.0, True),
        ("r128-4bit", 128, 4, 1.0, True),
        ("r256-4bit", 256, 4, 1.0, True),
        ("r64-16bit", 64, 16, 1.0, True),
        ("r64-4bit-no-down-date", 64, 4, 0.0, True),
        ("r64-4bit-no-rht", 64, 4, 1.0, False),
    ],
)
def test_a_row_of_caldera_is_what_its_name_says(name, rank, factor_bits, down_date, rotated):
    config = read_config(CONFIGS / f"paper/caldera-{name}.toml")
    plan = plan_linear(config, "model.layers.0.self_attn.q_proj")
    assert (plan.rank, plan.weight.bits, plan.iterations) == (rank, 2, 20)
    assert plan.factor.bits_per_value(4096) == factor_bits
    assert plan.method == Caldera("reconstruct", 50, down_date, 0.01)
    assert (plan.transform is not None) == rotated
    assert (config.calibration.num_samples, config.calibration.seq_len) == (256, 4096)


@pytest.mark.parametrize(
    ("name", "bits", "group"),
    [("w2", 2, "row"), ("w2g128", 2, 128), ("w2g64", 2, 64), ("w3", 3, "row"), ("w3g128", 3, 128), ("w4", 4, "row")],
)
def test_a_row_of_tesseraq_is_the_published_recipe(name, bits, group):
    config = read_config(CONFIGS / f"paper/tesseraq-{name}.toml")
    plan = plan_linear(config, "model.layers.0.self_attn.q_proj")
    assert (plan.weight.bits, plan.weight.block_size, plan.activation) == (bits, group, None)
    settings = plan.rounding
    rounds = len(settings.schedule({"q_proj": plan.weight.quantize(torch.zeros(2, 128))}))
    assert (rounds, settings.steps, settings.batch_size) == (20, 250, 4)
    assert settings.learning_rate == settings.scale_learning_rate == 1e-3
    assert (config.calibration.num_samples, config.calibration.seq_len) == (512, 2048)
    assert config.quantize.propagates_error


def test_two_texts_are_evaluated_with_divergence_under_any_method(tmp_path):
    child = tmp_path / "child.toml"
    child.write_text('extends = ["preset:gptq", "preset:protocols/two-texts"]\nmodel = "some/model"\n')
    config = read_config(child)
    assert config.calibration.dataset.path == "c4"
    assert [spec.path for spec in config.evaluation.perplexity.datasets] == ["wikitext2", "c4"]
    assert config.evaluation.divergence is not None
    assert config.evaluation.baselines == ("original",)


def test_the_largest_row_of_tesseraq_has_half_the_rates_batch_and_windows():
    config = read_config(CONFIGS / "paper/tesseraq-w2g128-70b.toml")
    settings = config.quantize.chosen_rounding
    assert (settings.steps, settings.batch_size, config.calibration.num_samples) == (250, 2, 256)
    assert settings.learning_rate == settings.scale_learning_rate == 5e-4


@pytest.mark.parametrize("name", ["tesseraq-fast", "tesseraq-gptq"])
def test_a_small_budget_has_few_steps_at_large_rates(name):
    config = read_config(CONFIGS / f"methods/{name}.toml", None, ["--model=some/model"])
    settings = config.quantize.chosen_rounding
    assert (settings.steps, settings.learning_rate, settings.scale_learning_rate) == (50, 2e-2, 1e-2)
    assert settings.start == ("codes" if name == "tesseraq-gptq" else "weights")


def test_the_demo_needs_no_hub():
    config = read_config(CONFIGS / "demo.toml")
    assert config.model.startswith("demo:")
    assert config.calibration.dataset.path == "pydoc"
    assert [spec.path for spec in config.evaluation.perplexity.datasets] == ["pydoc"]


def test_no_configuration_is_left_untested():
    tested = {*TEMPLATES, *PARTS, *PAPER, CONFIGS / "demo.toml"}
    assert set(CONFIGS.rglob("*.toml")) == tested
