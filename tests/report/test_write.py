"""What report.md says of the model and the machine."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from report_runs import run_results

from lqer.config.schema import CalibrationConfig
from lqer.report.environment import device_name
from lqer.report.paragraphs import COUNTED, shown_calibration
from lqer.report.write import shown_model, shown_scheme


@pytest.mark.parametrize(
    ("name", "description", "shown"),
    [
        ("/models/opt", "local folder opt", "/models/opt"),
        ("/models/opt/q4.gguf", "GGUF file q4.gguf", "/models/opt/q4.gguf"),
        ("facebook/opt-125m", "facebook/opt-125m@27dcfa74d334", "facebook/opt-125m@27dcfa74d334"),
    ],
)
def test_a_model_is_named_once(name, description, shown):
    model = {"architecture": "OPT", "parameters": 4_000_000, "quantized_parameters": 3_000_000}
    told = shown_model(model | {"name": name, "description": description})
    assert told == f"{shown} (OPT, 4.0M parameters; 75% of them quantized)."


def test_what_a_name_does_not_tell_is_said_beside_it():
    model = {"architecture": "OPT", "parameters": 4_000_000, "quantized_parameters": 3_000_000}
    told = shown_model(model | {"name": "demo:opt", "description": "Expanded from a 4-bit file."})
    assert told == "demo:opt (OPT, 4.0M parameters; 75% of them quantized).\nExpanded from a 4-bit file."


@pytest.mark.parametrize(
    ("method", "named", "rounding"),
    [("none", {"rounding": {"kind": "ldlq"}}, "ldlq"), ("gptq", {}, "gptq"), ("lqer-act", {}, "nearest")],
)
def test_a_scheme_is_told_with_its_rounding_also_where_the_method_brings_it(method, named, rounding):
    formats = {"weight": "w4", "activation": "x8", "attention": "none"}
    told = shown_scheme({"method": {"kind": method}, "transforms": [{"kind": "hadamard"}], **formats, **named})
    assert told.startswith(f"Method `{method}`, rounding `{rounding}`, weights `w4`, activations `x8`")
    assert told.endswith("attention operands `none`, transforms `hadamard`")


@pytest.mark.parametrize(("threads", "shown"), [(1, "CPU, 1 thread"), (2, "CPU, 2 threads")])
def test_a_cpu_is_named_with_its_threads(monkeypatch, threads, shown):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert device_name(torch.device("cpu")).endswith(shown)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "c4: 4096 tokens"),
        ({"token_weights": "none"}, "c4: 4096 tokens"),
        ({"token_weights": "gradient"}, "c4: 4096 tokens, weighted by squared gradients of the loss"),
    ],
)
def test_the_calibration_text_is_told_with_what_its_tokens_count(settings, told):
    results = run_results("a", 4.0, {})
    results["config"]["calibration"] = settings
    assert shown_calibration(results) == told


def test_all_weights_of_tokens_have_words():
    assert COUNTED.keys() == set(get_args(CalibrationConfig.model_fields["token_weights"].annotation))
