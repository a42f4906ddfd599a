"""The estimate for a mixture's shape is that of its blocks, read as they are stored."""

from __future__ import annotations

import pytest
from estimate_mixtures import row, stages_of

from lqer.resources.workload import total


@pytest.mark.parametrize("method", ["lqer-act", "gptq", "best-3"])
def test_blocks_are_counted_as_they_are_stored_and_as_they_are_run(method):
    stages = {stage.name: stage for stage in stages_of("tiny", method, windows=4, seq_len=16, max_memory="4GB")}
    walk, quantize = stages["calibrate" if method == "lqer-act" else "quantize"], stages["quantize"]
    ram, device = ({need.what: need.bytes for need in needs} for needs in (walk.ram, walk.device))
    attention, experts = 64 * 64 * 2 + 64 * 32 * 2, 4 * 3 * 64 * 128
    assert ram["two blocks as read"] == 2 * (2 * attention + experts)
    # With the router and two norms.
    block = 2 * (attention + experts + 4 * 64 + 2 * 64)
    assert "block as stored" not in {need.what for need in quantize.ram}
    assert device["block"] == block


def test_a_row_names_shape_method_and_what_is_held_in_ram_and_on_the_gpu():
    cells = (
        row("tiny", "gptq", stages_of("tiny", "gptq", windows=4, seq_len=16, max_memory="4GB")).strip("|").split("|")
    )
    assert [cell.strip() for cell in cells[:2]] == ["tiny", "gptq"]
    assert all(float(cell) > 0 for cell in cells[2:3])


@pytest.mark.parametrize("shape", ["deepseek-v3", "kimi-k2", "gpt-oss-120b", "deepseek-v4-flash"])
@pytest.mark.parametrize("method", ["lqer-act", "gptq", "best-3"])
def test_blocks_of_the_largest_mixtures_fit_24_gb_beside_a_gpu_of_80_gb(shape, method):
    for stage in stages_of(shape, method, windows=32, seq_len=2048, max_memory="4GB"):
        assert total(stage.ram) < 22e9  # beside what a process holds before any work
        assert total(stage.device) < 80e9
