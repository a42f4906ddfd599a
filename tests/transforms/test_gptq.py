"""GPTQ's codes of a block as the start of rounding its linears together."""

from __future__ import annotations

import pytest
import torch
from helpers import first_block

from lqer.formats import Int, MXInt
from lqer.methods.block import CHANGED_CODES, output_loss, reconstruct_block
from lqer.models.structure import block_linears
from lqer.rounding import Adaptive
from lqer.rounding.gptq import gptq
from lqer.rounding.hessian import damp
from lqer.transforms import Awq, Clip, GptqStart, unsupported_order
from lqer.transforms.base import Scheme
from lqer.transforms.block_problem import BlockProblem
from lqer.transforms.tracing import watched_inputs

W2 = Int(bits=2, block_size=16)


@pytest.fixture(scope="module")
def problem(random_model, windows_WT):
    _, call, hidden_STD = first_block(random_model("llama"), windows_WT)
    with torch.no_grad():
        targets_STD = call({}, hidden_STD)
    return BlockProblem(call, hidden_STD, targets_STD, dict.fromkeys(block_linears(call.block), W2), 2)


def test_every_linear_gets_the_codes_of_gptq_on_its_inputs(problem):
    seen = {}
    watched = {name: (lambda name, x: seen.setdefault(name, []).append(x)) for name in problem.formats}
    with (
        torch.no_grad(),
        watched_inputs(problem.call.block, {name: (lambda x, name=name: watched[name](name, x)) for name in watched}),
    ):
        problem.call({}, problem.inputs_STD)
    result = reconstruct_block(problem, [GptqStart(scales="search")], None)
    for name in ("self_attn.k_proj", "mlp.down_proj"):
        x_TI = torch.cat([x.flatten(0, -2) for x in seen[name]])
        expected = gptq(result.weight(problem, name), damp(x_TI.T @ x_TI), W2, scales="search")
        same = (result.rounded[name].parts["codes"] == expected.parts["codes"]).float().mean()
        assert same > 0.98, "sums in another order may move a weight between two codes"


def test_it_starts_better_than_clipping_and_is_trained_from_its_codes(problem):
    clipped = reconstruct_block(problem, [Awq(), Clip()], None)
    fed_back = reconstruct_block(problem, [Awq(), GptqStart(scales="search")], None)
    losses = [output_loss(problem, found.parameters, found.rounded) for found in (clipped, fed_back)]
    assert losses[1] < losses[0]
    rounding = Adaptive(start="codes", steps=6, batch_size=2, learning_rate=2e-2, soft_fractions=(0.6, 0.3, 0.1))
    trained = reconstruct_block(problem, [Awq(), GptqStart(scales="search")], rounding)
    assert trained.notes["loss"]["start"] == pytest.approx(losses[1], rel=1e-5)
    assert trained.notes["loss"]["end"] < losses[1]
    shares = trained.notes[CHANGED_CODES]
    for name, share in shares.items():
        codes, before = (found.rounded[name].parts["codes"] for found in (trained, fed_back))
        assert share == pytest.approx(float((codes != before).float().mean()))
    assert 0 < max(shares.values()) < 0.5


def test_without_a_step_its_codes_stay(problem):
    rounding = Adaptive(
        start="codes", steps=1, learning_rate=1e-9, scale_learning_rate=1e-9, tune_scales=False, soft_fractions=(0.5,)
    )
    trained = reconstruct_block(problem, [GptqStart()], rounding)
    assert set(trained.notes[CHANGED_CODES].values()) == {0.0}


def test_what_it_cannot_do_is_refused():
    assert unsupported_order([Clip(), GptqStart()]) == (
        '"clip" and "gptq" both fix the quantization scales: use one of them'
    )
    assert unsupported_order([Awq(), GptqStart()]) is None
    scheme = Scheme(MXInt(4, block_size="tensor"), None, frozenset())
    assert "block_size" in GptqStart().unsupported_reason(scheme)
    with pytest.raises(ValueError, match=r"scales 'best' is not one of .* \(gptq\)"):
        GptqStart(scales="best")
