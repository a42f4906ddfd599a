"""Templates of models that are more than a stack of attention, run on tiny random models of their architectures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from campaigns.tiny import build, tiny_config
from safetensors.torch import load_file

import lqer
from lqer.models.source import resolve_model
from lqer.models.streaming import open_model

TEMPLATES = Path(__file__).parents[2] / "configs" / "template"
PROCESSOR = {"image_processor_type": "Gemma3ImageProcessor", "do_resize": True}
# The architecture of a template's model in two or more kinds of blocks, and settings that make it tiny.
HYBRID = {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0}
MODELS = {
    "qwen3.5-27b": ("qwen3_5", True, {}),
    "qwen3.5-35b-a3b": ("qwen3_5_moe", True, {}),
    "gemma-4-e2b": ("gemma4", True, {"vision_config": tiny_config("gemma4_vision").to_dict()}),
    "granite-4.0-h-tiny": ("granitemoehybrid", False, HYBRID),
}


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"{number} is followed by {number + 1}." for number in range(400)), encoding="utf-8")
    return path


@pytest.mark.parametrize("template", MODELS)
def test_a_template_quantizes_a_tiny_model_of_its_architecture(template, tmp_path, text):
    kind, wrapper, settings = MODELS[template]
    build(tmp_path / "model", kind, wrapper=wrapper, **settings)
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    lqer.quantize(
        tmp_path / "model",
        str(TEMPLATES / f"{template}.toml"),
        tag="run",
        quantize={"low_rank": {"rank": 4, "format": "x8"}},
        calibration={"dataset": str(text), "num_samples": 2, "seq_len": 32, "error_tokens": 32},
        evaluation={"baselines": [], "perplexity": {"datasets": [str(text)], "seq_len": 32, "max_windows": 2}},
        output_dir=str(tmp_path),
        device="cpu",
    )
    checkpoint = tmp_path / "run" / "checkpoint"
    assert json.loads((checkpoint / "preprocessor_config.json").read_text()) == PROCESSOR
    details = json.loads((checkpoint / "lqer.json").read_text())
    assert all(name.startswith(f"{details['blocks']['name']}.") for name in details["linears"])
    original = open_model(resolve_model(str(tmp_path / "model")), torch.float32, torch.device("cpu"))
    original.loader.load_outer()
    kept = load_file(checkpoint / "outside.safetensors")
    for name, tensor in kept.items():
        assert torch.equal(tensor, original.model.state_dict()[name]), name
    assert wrapper == any("vision" in name or "visual" in name for name in kept)
    model = lqer.load_quantized(checkpoint, "cpu")
    ids_BT = torch.arange(1, 33).view(2, 16)
    assert model.generate(ids_BT, max_new_tokens=3, do_sample=False).shape == (2, 19)
