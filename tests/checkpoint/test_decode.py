"""Generation with a static cache and a compiled step gives the tokens that plain generation gives."""

from __future__ import annotations

import pytest
import torch
from kernel_layers import DTYPE, ON_GPU, build_layer

import lqer
from lqer.checkpoint.decode import fuses_right, inductor_options
from lqer.checkpoint.fuse import FUSE_INTO_LINEARS
from lqer.formats import Int, MXInt
from lqer.kernels import TritonLinear
from lqer.kernels.siblings import SiblingLinear
from lqer.methods import LinearPlan, LqerAct

PLAN = LinearPlan(
    method=LqerAct(), weight=MXInt(4), activation=MXInt(8), bias=MXInt(8), rank=8, factor=MXInt(8),
    factor_axis="reduction",
)  # fmt: skip
NEW_TOKENS = 12
TIE = 0.02  # relative to the spread of logits: kernels and torch add in another order, in float16


def greedy(model, ids_BT):
    return model.generate(ids_BT, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)


@torch.no_grad()
@pytest.mark.parametrize("max_cache_len", [None, 64])
def test_a_static_cache_gives_the_same_greedy_tokens(max_cache_len, random_model, run_stages, windows_WT):
    checkpoint = run_stages(random_model("llama"), PLAN).checkpoint.path
    model = lqer.load_quantized(checkpoint, "cpu", backend="emulate")
    expected = greedy(model, windows_WT[:2, :5])
    compiled = lqer.compile_decode(model, max_cache_len)
    assert compiled is model
    output = model.generate(
        windows_WT[:2, :5], max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(output.sequences, expected)
    cache = output.past_key_values
    assert type(cache).__name__ == "StaticCache"
    assert cache.layers[0].keys.shape[2] >= 5 + NEW_TOKENS - 1


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_linears_of_one_input_run_as_one_in_a_loaded_model(
    architecture, random_model, run_stages, windows_WT, monkeypatch
):
    checkpoint = run_stages(random_model(architecture), PLAN).checkpoint.path
    # Without a GPU the interpreter runs the backend that is refused otherwise.
    monkeypatch.setattr("lqer.checkpoint.backend.resolve_backend", lambda wanted, *_: wanted)
    device = "cuda" if ON_GPU else "cpu"
    exact, emulation, kernels = (
        lqer.load_quantized(checkpoint, device, dtype, backend)
        for dtype, backend in ((torch.float32, "emulate"), (DTYPE, "emulate"), (DTYPE, "triton"))
    )
    names = {name.rpartition(".")[2] for name, module in kernels.named_modules() if isinstance(module, SiblingLinear)}
    assert names == {"q_proj", "k_proj", "v_proj"} | ({"gate_proj", "up_proj"} if architecture == "llama" else set())
    assert {name for name, _ in kernels.named_modules()} == {name for name, _ in emulation.named_modules()}
    ids_BT = windows_WT[:1, :4].to(device)
    expected, emulated, found = (model(ids_BT).logits.double() for model in (exact, emulation, kernels))
    assert (found - expected).norm() < 1.5 * (emulated - expected).norm()


def test_kernels_that_fuse_wrongly_leave_norms_to_the_compiler(monkeypatch):
    def differ(_) -> None:
        raise ArithmeticError("kernels of this linear differ")

    layer = TritonLinear(build_layer(MXInt(4), 32, 128).packed)
    assert fuses_right(layer)
    monkeypatch.setattr("lqer.kernels.compare_fused_once", differ)
    with pytest.warns(UserWarning, match=r"launches of their own: kernels of this linear differ"):
        assert not fuses_right(layer)
    assert FUSE_INTO_LINEARS in inductor_options().values()
    assert FUSE_INTO_LINEARS not in inductor_options(fuse=False).values()


@pytest.mark.skipif(not ON_GPU, reason="compiles CUDA graphs")
@torch.no_grad()
@pytest.mark.parametrize("weight", [MXInt(4), Int(4, 32)])
def test_compiled_decoding_on_a_gpu_gives_the_tokens_of_plain_decoding(weight, random_model, run_stages, windows_WT):
    plan = LinearPlan(LqerAct(), weight, None, None, 8, MXInt(8), "reduction")
    checkpoint = run_stages(random_model("llama"), plan).checkpoint.path
    model = lqer.load_quantized(checkpoint, "cuda", torch.float16, backend="triton")
    ids_BT = windows_WT[:2, :5].cuda()
    expected = greedy(model, ids_BT)
    for _ in range(2):
        found = greedy(lqer.compile_decode(model), ids_BT)
        for found_T, expected_T in zip(found, expected, strict=True):
            differ = (found_T != expected_T).nonzero()
            if len(differ):
                # A tie of two logits may fall otherwise; from there on texts differ.
                first = int(differ[0])
                logits_V = model(expected_T[None, :first]).logits[0, -1].float()
                assert logits_V.max() - logits_V[found_T[first]] < TIE * logits_V.std()
