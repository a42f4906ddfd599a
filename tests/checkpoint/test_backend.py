"""Which backend runs a checkpoint, and why not the other one."""

from __future__ import annotations

import pytest
import torch

from lqer.checkpoint.backend import kernels_unsupported_reason, resolve_backend
from lqer.errors import ModelError
from lqer.formats import MX, Int, MXInt

CPU, GPU = torch.device("cpu"), torch.device("cuda")
W4A8 = {"model.layers.0.q_proj": (MXInt(4), MXInt(8))}


def test_without_a_gpu_auto_means_emulation_and_triton_is_refused():
    assert resolve_backend("auto", CPU, torch.float32, W4A8) == "emulate"
    with pytest.raises(ModelError, match='"triton" cannot run here: it needs a GPU, and the device is cpu'):
        resolve_backend("triton", CPU, torch.bfloat16, W4A8)


def test_on_a_gpu_the_kernels_run_unless_they_cannot_or_emulation_is_asked_for():
    assert resolve_backend("triton", GPU, torch.bfloat16, W4A8) == "triton"
    assert resolve_backend("auto", GPU, torch.bfloat16, W4A8) == "triton"
    assert resolve_backend("emulate", GPU, torch.bfloat16, W4A8) == "emulate"
    assert resolve_backend("auto", GPU, torch.float32, W4A8) == "emulate"
    with pytest.raises(ModelError, match="the dtype is float32"):
        resolve_backend("triton", GPU, torch.float32, W4A8)


@pytest.mark.parametrize(
    ("dtype", "formats", "reason"),
    [
        (torch.float32, (MXInt(4), None), "it computes in bfloat16 or float16, and the dtype is float32"),
        (
            torch.bfloat16,
            (MX("mxfp4_e2m1"), None),
            'a.b: kernels support weights of kind "mxint", "int", "codebook", "e8p" and "trellis", found "mx"',
        ),
        (torch.bfloat16, (Int(4, 96), None), 'a.b: block_size 96 is neither "row" nor a power of two of at least 16'),
        (torch.bfloat16, (MXInt(4), Int(8)), 'a.b: kernels round activations to "mxint"'),
    ],
)
def test_an_obstacle_names_the_linear_and_the_rule(dtype, formats, reason):
    assert reason in kernels_unsupported_reason(GPU, dtype, {"a.b": formats})
