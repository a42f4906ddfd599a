"""The benchmark of evaluation: which windows are timed, and with what attention."""

from __future__ import annotations

import benchmark_evaluation as benchmark
import pytest
import torch
from decoder_benchmark.models import BF16, CONFIG

SMALL = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("scheme", [BF16, "w4a8-rank32"])
def test_the_first_window_is_apart_and_every_other_is_scored_once(scheme, monkeypatch):
    scored = []

    def keep(model, windows, progress):
        implementation = model.config._attn_implementation
        scored.append((implementation.startswith("lqer_"), [window_BT.shape for window_BT in windows]))

    monkeypatch.setattr(benchmark, "window_nlls", keep)
    seconds, first = benchmark.time_windows(scheme, 3, 8, {**CONFIG, **SMALL}, torch.device("cpu"))
    rounded = scheme in benchmark.WITH_ATTENTION
    assert scored == [(rounded, [(1, 8)]), (rounded, [(1, 8)] * 3)]
    assert seconds > 0
    assert first > 0
