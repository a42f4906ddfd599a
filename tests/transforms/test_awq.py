from __future__ import annotations

import pytest
import torch
from helpers import first_block
from torch import nn

from lqer.formats import Int
from lqer.models.structure import block_linears
from lqer.transforms.awq import RATIOS, scale_block, scale_of, tie
from lqer.transforms.block_function import BlockFunction
from lqer.transforms.folding import NO_ROW

W3 = Int(bits=3, block_size=16, scale_dtype="float32")


@pytest.fixture(scope="module")
def scaled(architecture, random_model, windows_WT):
    block, call, hidden = first_block(random_model(architecture), windows_WT)
    # A channel of the residual stream that stands out, as they do in trained models.
    hidden = hidden.clone()
    hidden[..., 3] *= 8
    changed, found = scale_block(call, [hidden], dict.fromkeys(block_linears(block), W3))
    return block, call, hidden, changed, found


def test_the_function_is_the_same_before_quantization(scaled):
    _, call, hidden, changed, found = scaled
    assert any(site.ratio > 0 for site in found)
    torch.testing.assert_close(call(changed, hidden), call({}, hidden), rtol=1e-4, atol=1e-4)


def test_the_error_of_every_site_is_at_most_that_of_plain_rounding(scaled):
    for found in scaled[-1]:
        assert found.errors[found.ratio] == min(found.errors.values()) <= found.errors[0.0]


def test_the_module_is_left_as_it_was(scaled):
    block, _, _, changed, _ = scaled
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in block.modules())
    assert any(not torch.equal(changed[name], block.get_parameter(name)) for name in changed)


def test_one_statistic_is_taken_over_all_batches(random_model, windows_WT):
    block, call, hidden = first_block(random_model("llama"), windows_WT[:4])
    formats = dict.fromkeys(block_linears(block), W3)
    _, whole = scale_block(call, [hidden], formats)
    _, call, _ = first_block(random_model("llama"), windows_WT[:2])
    _, halves = scale_block(call, [*hidden.split(2)], formats)
    for one, other in zip(whole, halves, strict=True):
        assert one.ratio == other.ratio
        torch.testing.assert_close(one.scale_I, other.scale_I)


def test_only_the_sites_with_formats_are_scaled(random_model, windows_WT):
    _, call, hidden = first_block(random_model("llama"), windows_WT)
    changed, found = scale_block(call, [hidden], {"mlp.down_proj": W3, "mlp.gate_proj": W3})
    assert [entry.site.linears for entry in found] == [("mlp.down_proj",)]
    assert changed.keys() == {"mlp.down_proj.weight", "mlp.up_proj.weight"}


def test_ratio_zero_is_plain_rounding():
    assert torch.equal(scale_of(torch.rand(64) * 5, 0.0), torch.ones(64))


def test_a_scale_is_the_power_of_the_magnitude_balanced_around_one():
    scale_I = scale_of(torch.tensor([16.0, 1.0, 4.0]), 0.5)
    torch.testing.assert_close(scale_I, torch.tensor([4.0, 1.0, 2.0]) / 2)
    assert scale_of(torch.tensor([0.0, 1.0]), 0.5).isfinite().all()


def test_the_grid_is_the_published_one():
    assert len(RATIOS) == 20
    assert RATIOS[0] == 0.0
    assert RATIOS[-1] == 0.95


def test_channels_of_one_row_share_their_mean():
    rows_I = torch.tensor([1, 0, 1, NO_ROW])
    assert tie(torch.tensor([1.0, 5.0, 3.0, 0.0]), rows_I).tolist() == [2.0, 5.0, 2.0, 3.0]


def test_the_search_finds_the_ratio_that_an_independent_scan_finds():
    torch.manual_seed(0)
    block = nn.Sequential(nn.RMSNorm(32), nn.Linear(32, 32, bias=False))
    x_BTI = torch.randn(5, 40, 32) * torch.logspace(-1, 1, 32)
    _, (found,) = scale_block(BlockFunction(block), [*x_BTI.split(2)], {"1": W3})
    normed_TI = block[0](x_BTI).detach().flatten(0, 1)
    weight = block[1].weight.detach()
    scan = []
    for i in range(20):
        scale = normed_TI.abs().mean(0) ** (i / 20)
        rounded = W3.quantize(weight * scale).dequantize()
        scan.append((((normed_TI / scale) @ rounded.T - normed_TI @ weight.T).square().sum().item(), i / 20))
    assert found.ratio == min(scan)[1] > 0
    assert found.errors[found.ratio] == pytest.approx(min(scan)[0], rel=1e-3)
