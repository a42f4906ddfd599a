"""Decode speed is measured where it means something: on one GPU, and of a quantized model on kernels."""

from __future__ import annotations

import pytest
import torch

from lqer.config import read_config
from lqer.run import pipeline

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run(experiment, *overrides: str):
    return pipeline.run(read_config(experiment.config, "speed", ["--evaluation.decode_speed=true", *overrides]))


def test_without_a_gpu_nothing_is_measured(experiment):
    assert run(experiment)["tokens_per_second"] == {"original": None, "quantized": None}


@needs_gpu
def test_on_kernels_the_checkpoint_is_measured_beside_the_original(experiment):
    settings = ("--device=cuda", "--dtype=bfloat16", "--evaluation.backend=triton", "--quantize.attention=none")
    found = run(experiment, *settings)["tokens_per_second"]
    assert found["original"] > 0
    assert found["quantized"] > 0


@needs_gpu
def test_in_emulation_only_the_original_is_measured(experiment):
    found = run(experiment, "--device=cuda", "--evaluation.backend=emulate")["tokens_per_second"]
    assert found["original"] > 0
    assert found["quantized"] is None
