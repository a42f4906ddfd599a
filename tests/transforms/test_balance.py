from __future__ import annotations

import pytest
import torch
from helpers import first_block

from lqer.formats import Int
from lqer.models.structure import block_linears
from lqer.rounding.gptq import gptq
from lqer.rounding.hessian import damp
from lqer.transforms import Balance
from lqer.transforms.balance import balanced_scale
from lqer.transforms.block_problem import BlockProblem
from lqer.transforms.block_result import BlockResult
from lqer.transforms.block_transform import no_progress, save_nothing
from lqer.transforms.folding import NO_ROW

W3 = Int(bits=3, block_size=16, scale_dtype="float32")


@pytest.fixture
def balanced(random_model, windows_WT):
    """The problem of a block with grouped queries, and what became of it."""
    block, call, hidden = first_block(random_model("llama"), windows_WT[:1])
    problem = BlockProblem(call, hidden, hidden, dict.fromkeys(block_linears(block), W3), batch_size=1)
    return problem, Balance(strength=1.0, limit=8.0).apply(problem, BlockResult(), no_progress, save_nothing)


def test_the_function_stays(balanced):
    problem, result = balanced
    expected = problem.call({}, problem.inputs_STD)
    torch.testing.assert_close(problem.call(result.parameters, problem.inputs_STD), expected, rtol=1e-4, atol=1e-4)


def test_linears_take_scales_and_norms_do_not(balanced):
    _, result = balanced
    assert set(result.parameters) == {
        f"{name}.weight" for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    }
    assert result.notes["balance"].keys() == {"self_attn.o_proj", "mlp.down_proj"}


def problem_of(seed: int = 0, tokens: int = 1024, channels: int = 64):
    """A weight, the Hessian of inputs whose sizes vary, and rows of a source: one for each channel."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(48, channels, generator=generator)
    x_TI = torch.randn(tokens, channels, generator=generator) * torch.randn(channels, generator=generator).exp()
    return weight_OI, x_TI.T @ x_TI / tokens, torch.arange(channels)


def test_the_bound_is_met_by_the_full_strength():
    weight_OI, hessian_II, rows_I = problem_of()
    hessian_II = torch.diag(hessian_II.diagonal())
    cost_I, energy_I = hessian_II.diagonal().double(), weight_OI.double().square().sum(0)

    def error(scale_I):
        return (scale_I**2 * energy_I).sum() * (cost_I / scale_I**2).sum()

    scale_I = balanced_scale([weight_OI], hessian_II, rows_I, 1.0, 1e6, damping=0.0).double()
    torch.testing.assert_close(error(scale_I), (energy_I * cost_I).sqrt().sum() ** 2, rtol=1e-5, atol=0)
    for seed in range(4):
        noise_I = torch.randn(len(scale_I), generator=torch.Generator().manual_seed(seed)).mul(0.1).exp()
        assert error(scale_I * noise_I) > error(scale_I)


def test_rounding_under_the_scale_loses_less():
    weight_OI, hessian_II, rows_I = problem_of()

    def loss(scale_I):
        rounded = gptq(weight_OI * scale_I, damp(hessian_II / scale_I / scale_I[:, None]), W3, scales="least-squares")
        error_OI = rounded.dequantize() / scale_I - weight_OI
        return float(((error_OI @ hessian_II) * error_OI).sum())

    assert loss(balanced_scale([weight_OI], hessian_II, rows_I, 0.5, 2.0)) < 0.9 * loss(torch.ones(64))


def test_the_scale_is_limited_and_of_mean_one_before():
    weight_OI, hessian_II, rows_I = problem_of()
    scale_I = balanced_scale([weight_OI], hessian_II, rows_I, 1.0, 1.25)
    assert float(scale_I.max()) == 1.25
    assert float(scale_I.min()) == pytest.approx(0.8)
    free_I = balanced_scale([weight_OI], hessian_II, rows_I, 1.0, 1e6)
    assert float(free_I.log().mean()) == pytest.approx(0, abs=1e-6)


def test_channels_of_one_row_share_a_scale_and_those_of_none_have_none():
    weight_OI, hessian_II, rows_I = problem_of()
    rows_I = rows_I // 2
    rows_I[-2:] = NO_ROW
    hessian_II[:, 5] = hessian_II[5] = 0
    scale_I = balanced_scale([weight_OI], hessian_II, rows_I, 1.0, 1e6)
    assert torch.equal(scale_I[6:62:2], scale_I[7:62:2])
    assert scale_I[-2:].tolist() == [1, 1]


@pytest.mark.parametrize("settings", [{"limit": 0.5}, {"strength": -1.0}, {"damping": -1.0}])
def test_settings_without_a_meaning_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Balance(**settings)
