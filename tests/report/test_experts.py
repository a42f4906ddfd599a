"""Bits that a token reads, and experts that saw little of the text: against sums by hand."""

from __future__ import annotations

import pytest

from lqer.config.schema import CalibrationConfig
from lqer.report.experts import MOST_NAMED, experts_info, experts_paragraphs, experts_warnings

LAYER = "model.layers.0.mlp.experts"
TOKENS = 1000


def row(name: str, weights: tuple[int, int], bits: int, routed: int | None = None) -> dict:
    """Of a linear with `bits` bits of codes a weight, and 10 bits of scales, 4 of which are zero points."""
    out_features, in_features = weights
    parts = {"weight": bits * out_features * in_features, "metadata": 10, "low_rank": 7, "codebook": 0, "zero": 4}
    of_expert = {} if routed is None else {"routed_tokens": routed}
    return {
        "name": name, "out_features": out_features, "in_features": in_features, "sign_bits": 0,
        **{f"{part}_bits": count for part, count in parts.items()}, **of_expert,
    }  # fmt: skip


ROWS = [
    row("model.layers.0.self_attn.q_proj", (8, 8), 4),
    row(f"{LAYER}.0.up_proj", (4, 8), 3, 600),
    row(f"{LAYER}.0.down_proj", (8, 4), 3, 600),
    row(f"{LAYER}.1.up_proj", (4, 8), 3, 400),
    row(f"{LAYER}.2.up_proj", (4, 8), 3, 0),
]


def test_a_token_reads_every_expert_as_often_as_it_is_sent_there():
    info = experts_info(ROWS, CalibrationConfig(min_expert_tokens=512), TOKENS)
    assert info is not None
    weights = 64 + 0.6 * 2 * 32 + 0.4 * 32
    assert info["active_weights"] == pytest.approx(weights)
    # Zero points are part of the metadata.
    bits = 64 * 4 + 17 + 0.6 * 2 * (32 * 3 + 17) + 0.4 * (32 * 3 + 17)
    assert info["active_bits"] == pytest.approx(bits)
    assert info["active_average"] == pytest.approx(bits / weights)
    assert (info["count"], info["fewest_tokens"]) == (3, 0)


def test_experts_that_saw_few_tokens_are_named_and_a_model_without_experts_has_none():
    info = experts_info(ROWS, CalibrationConfig(min_expert_tokens=512), TOKENS)
    assert info["topped_up"] == [f"{LAYER}.1", f"{LAYER}.2"]
    assert info["unseen"] == [f"{LAYER}.2"]
    (warning,) = experts_warnings(info, 512)
    assert warning.startswith("2 of 3 experts were sent fewer than 512 calibration tokens, 1 of them none")
    assert warning.endswith(f"{LAYER}.1, {LAYER}.2")
    assert experts_info(ROWS[:1], CalibrationConfig(), TOKENS) is None
    assert experts_warnings(None, 512) == []


def test_of_many_experts_the_first_are_named():
    rows = [row(f"{LAYER}.{index}.up_proj", (4, 8), 3, 1) for index in range(MOST_NAMED + 3)]
    (warning,) = experts_warnings(experts_info(rows, CalibrationConfig(min_expert_tokens=2), TOKENS), 2)
    assert warning.endswith(f"{LAYER}.{MOST_NAMED - 1} and 3 more")


def test_experts_that_are_calibrated_on_all_tokens_lack_none():
    info = experts_info(ROWS, CalibrationConfig(experts="all", min_expert_tokens=512), TOKENS)
    assert info["topped_up"] == []
    assert experts_warnings(info, 512) == []


def test_the_report_tells_active_bits_beside_those_of_all_weights():
    info = experts_info(ROWS, CalibrationConfig(), TOKENS)
    results = {
        "experts": info, "bits": {"average": 4.0}, "model": {"quantized_parameters": 2_000_000},
        "calibration": {"tokens": TOKENS},
    }  # fmt: skip
    (paragraph,) = experts_paragraphs(results)
    assert f"{info['active_average']:.4f} bits per active weight" in paragraph
    assert "of their 1 MB" in paragraph
    assert "got 0 of 1000 tokens" in paragraph
    assert experts_paragraphs({**results, "experts": None}) == []
