"""Experts on a GPU: the model's own grouped products, statistics gathered there, and kernels on packed codes."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import resident
from mixtures import random_mixture

from lqer.checkpoint.load import load_quantized
from lqer.models.structure import prepare_model
from lqer.models.walker import walk_blocks
from lqer.stages import gather_experts
from lqer.stages.gather import CalibrationText, observe_block
from lqer.statistics import Hessian

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# Wide enough for the kernels.
SIZES = {"hidden_size": 128, "intermediate_size": 128}
KINDS = ("qwen3_moe", "gpt_oss")


@pytest.fixture(scope="module", params=KINDS)
def original(request):
    more = {"moe_intermediate_size": 128} if request.param == "qwen3_moe" else {}
    return random_mixture(request.param, **SIZES, **more)


@pytest.fixture(scope="module")
def split(original):
    model = copy.deepcopy(original)
    prepare_model(model)
    return model


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_a_split_model_computes_what_the_models_own_products_do(original, split, implementation, windows_WT):
    own, ours = (copy.deepcopy(model).to("cuda", torch.float32) for model in (original, split))
    own.config._experts_implementation = implementation
    expected, found = (model(windows_WT.cuda()).logits for model in (own, ours))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_statistics_of_experts_are_those_of_a_cpu_in_one_pass_or_many(split, windows_WT, monkeypatch):
    text = CalibrationText(windows_WT, 2, 24)

    def gathered(device: str) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(split).to(device)
        run = next(walk_blocks(resident(model, device), windows_WT, 2))
        return {name: x.cpu() for name, x in observe_block(run, None, text, {Hessian()}).tensors.items()}

    on_cpu, on_gpu = gathered("cpu"), gathered("cuda")
    monkeypatch.setattr(gather_experts, "PASS_BYTES", 1)
    in_passes = gathered("cuda")
    assert on_cpu.keys() == on_gpu.keys() == in_passes.keys()
    for name, tensor in on_cpu.items():
        if name.endswith(("hessian", "mean_square", "routed_tokens")):
            torch.testing.assert_close(on_gpu[name], tensor, rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(in_passes[name], on_gpu[name], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_kernels_on_packed_codes_compute_what_emulation_computes(split, run_stages, plan, windows_WT):
    checkpoint = run_stages(split, plan).checkpoint.path
    logits = [
        load_quantized(checkpoint, "cuda", torch.bfloat16, backend)(windows_WT.cuda()).logits.float()
        for backend in ("emulate", "triton")
    ]
    error = torch.linalg.vector_norm(logits[0] - logits[1]) / torch.linalg.vector_norm(logits[0])
    # A token whose router hesitates may go elsewhere.
    assert error < 0.1
    own = torch.linalg.vector_norm(split(windows_WT).logits - logits[0].cpu()) / torch.linalg.vector_norm(logits[0])
    assert own < 0.2
