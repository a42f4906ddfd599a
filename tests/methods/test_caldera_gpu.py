"""CALDERA and layers in a rotated basis on a GPU, where there is one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lqer.formats import E8P, MXInt
from lqer.methods import Caldera, LinearPlan
from lqer.nn.linear import HadamardLinear, QuantizedLinear
from lqer.rounding import Ldlq
from lqer.transforms import Hadamard
from lqer.transforms.hadamard import random_hadamard

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


@pytest.mark.parametrize("factor", [E8P(4, block_size="row", scale_dtype="float16"), MXInt(4)])
def test_a_gpu_finds_a_decomposition_as_good_as_a_cpus(factor):
    generator = torch.Generator().manual_seed(0)
    weight_OI = 0.05 * torch.randn(288, 384, generator=generator)
    x_TI = torch.randn(2000, 384, generator=generator) @ torch.randn(384, 384, generator=generator) / 384**0.5
    statistics = {"hessian": x_TI.T @ x_TI / len(x_TI)}
    plan = LinearPlan(
        Caldera(down_date=0.97), E8P(2), None, None, 16, factor, "outer",
        rounding=Ldlq(tune_iters=1), transform=Hadamard(), iterations=3,
    )  # fmt: skip
    on_cpu = plan.quantize(weight_OI, statistics)
    statistics = {key: value.to(CUDA) for key, value in statistics.items()}
    on_gpu = plan.quantize(weight_OI.to(CUDA), statistics)
    # Ties of rounding fall to either side, so the codes differ; the quality must not.
    assert min(on_gpu.errors[1:]) == pytest.approx(min(on_cpu.errors[1:]), rel=0.02)
    assert on_gpu.effective_weight().device.type == "cuda"
    plain = replace(plan.without_low_rank(), rounding=Ldlq()).quantize(weight_OI.to(CUDA), statistics)
    assert plain.effective_weight().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_in_another_basis_runs_inside_a_cuda_graph(dtype):
    """288 = 36 * 8 has a small factor, which must be on the device before a graph is captured."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(192, 288, generator=generator).to(CUDA, dtype) / 17
    basis = random_hadamard(192, 288, seed=0).to(dtype)
    layer = HadamardLinear(QuantizedLinear(weight_OI, None, None, None, None), basis, None).to(CUDA)
    x_TI = torch.randn(1, 288, generator=generator).to(CUDA, dtype)
    expected_TO = layer(x_TI)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured_TO = layer(x_TI)
    x_TI.mul_(2)
    graph.replay()
    torch.testing.assert_close(captured_TO, 2 * expected_TO, rtol=2e-2, atol=2e-2)
