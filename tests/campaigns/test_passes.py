"""A short form of the campaign of passes: one of every way in which blocks call their linears."""

from __future__ import annotations

import passes
import pytest


# Keys and values of other blocks, experts beside a shared one, a scan and a convolution, linears that no text reaches.
@pytest.mark.parametrize("kind", ["gpt2", "gemma4_text", "qwen2_moe", "jamba", "mamba"])
def test_a_pass_that_ends_early_has_the_statistics_of_a_whole_one(kind, tmp_path):
    found = passes.passes_of(kind, tmp_path / "model")
    assert found["passes"] >= 4
    assert 0 < found["early"] <= found["passes"]
    assert not found["different"]
