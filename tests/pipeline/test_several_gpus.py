"""Evaluation over several GPUs gives the numbers of one."""

from __future__ import annotations

import pytest
import torch

from lqer.config import read_config
from lqer.pipeline import run


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("dtype", "backend"), [("float32", "emulate"), ("bfloat16", "triton")])
def test_a_run_spread_over_all_gpus_ends_with_the_numbers_of_one(experiment, tmp_path, dtype, backend):
    # Attention operands stay as they are: kernels run linears.
    overrides = ["--device=cuda", f"--dtype={dtype}", f"--evaluation.backend={backend}", "--quantize.attention=none"]
    one, all_of_them = (
        run(read_config(str(experiment.config), device_map, [*overrides, f"--output_dir={tmp_path / device_map}",
                                                             f"--device_map={device_map}"]))
        for device_map in ("single", "auto")
    )  # fmt: skip
    assert one["perplexity"] == all_of_them["perplexity"]
    assert {"original", "plain", "quantized"} <= set(one["perplexity"][0])
