from __future__ import annotations

import pytest
import torch
from helpers import first_block
from reference import awq as reference
from torch import nn

from lqer.formats import Int
from lqer.models.structure import block_linears
from lqer.transforms import Awq
from lqer.transforms.awq import (
    RATIOS,
    duo_scale_of,
    evenly_spaced,
    scale_block,
    scale_of,
    weight_magnitudes,
)
from lqer.transforms.block_function import BlockFunction
from lqer.transforms.block_statistics import mean_magnitudes

W3 = Int(bits=3, block_size=16, scale_dtype="float32")


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "duo"])
def scaled(architecture, random_model, windows_WT, request):
    block, call, hidden = first_block(random_model(architecture), windows_WT)
    # A channel of the residual stream that stands out, as they do in trained models.
    hidden = hidden.clone()
    hidden[..., 3] *= 8
    changed, found = scale_block(
        call, [hidden], [hidden], dict.fromkeys(block_linears(block), W3), duo_scaling=request.param
    )
    return block, call, hidden, changed, found


def test_the_function_is_the_same_before_quantization(scaled):
    _, call, hidden, changed, found = scaled
    assert any(site.ratio for site in found)
    torch.testing.assert_close(call(changed, hidden), call({}, hidden), rtol=1e-4, atol=1e-4)


def test_the_error_of_every_site_is_at_most_that_of_plain_rounding(scaled):
    for found in scaled[-1]:
        plain = found.errors[None] if None in found.errors else found.errors[0.0]
        assert found.errors[found.ratio] == min(found.errors.values()) <= plain


def test_the_module_is_left_as_it_was(scaled):
    block, _, _, changed, _ = scaled
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in block.modules())
    assert any(not torch.equal(changed[name], block.get_parameter(name)) for name in changed)


def test_one_statistic_is_taken_over_all_batches(random_model, windows_WT):
    block, call, hidden = first_block(random_model("llama"), windows_WT[:4])
    formats = dict.fromkeys(block_linears(block), W3)
    _, whole = scale_block(call, [hidden], [hidden], formats)
    _, call, _ = first_block(random_model("llama"), windows_WT[:2])
    _, halves = scale_block(call, hidden.split(2), hidden.split(2), formats)
    for one, other in zip(whole, halves, strict=True):
        assert one.ratio == other.ratio
        torch.testing.assert_close(one.scale_I, other.scale_I)


def test_only_the_sites_with_formats_are_scaled(random_model, windows_WT):
    _, call, hidden = first_block(random_model("llama"), windows_WT)
    changed, found = scale_block(call, [hidden], [hidden], {"mlp.down_proj": W3, "mlp.gate_proj": W3})
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


@pytest.mark.parametrize("duo_scaling", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_an_independent_search_over_the_same_rows_finds_the_same_scales(duo_scaling, bits):
    torch.manual_seed(bits)
    block = nn.Sequential(nn.RMSNorm(32), nn.Linear(32, 32, bias=False))
    block[1].weight.data *= torch.logspace(-0.5, 0.5, 32)[torch.randperm(32)]
    x_BTI = torch.randn(4, 20, 32) * torch.logspace(-1, 1, 32)
    number_format = Int(bits=bits, block_size=16, scale_dtype="float32")
    _, (found,) = scale_block(
        BlockFunction(block), x_BTI.split(2), x_BTI.split(2), {"1": number_format}, duo_scaling=duo_scaling
    )
    normed_NI = block[0](x_BTI).detach().flatten(0, 1)
    ratio, scale_I, errors = reference.search(normed_NI, block[1].weight.detach(), bits, 16, duo_scaling=duo_scaling)
    assert found.ratio == ratio
    torch.testing.assert_close(found.scale_I, scale_I.float(), rtol=1e-5, atol=0)
    assert [found.errors[ratio] for ratio in RATIOS] == pytest.approx(errors, rel=1e-3)


def test_means_come_from_all_the_text_and_errors_from_the_searched_part():
    torch.manual_seed(0)
    block = nn.Sequential(nn.RMSNorm(32), nn.Linear(32, 32, bias=False))
    x_BTI = torch.randn(6, 20, 32) * torch.logspace(-1, 1, 32)
    call, formats = BlockFunction(block), {"1": W3}
    _, (part,) = scale_block(call, x_BTI.split(2), [x_BTI[:2]], formats)
    _, (whole,) = scale_block(call, x_BTI.split(2), x_BTI.split(2), formats)
    mean_I = mean_magnitudes(call, x_BTI.split(2), ["1"])["1"]
    torch.testing.assert_close(part.scale_I, scale_of(mean_I, part.ratio))
    normed_NI, weight_OI = block[0](x_BTI[:2]).detach().flatten(0, 1), block[1].weight.detach()
    scale_I = scale_of(mean_I, 0.5)
    error_OI = W3.fake_quantize(weight_OI * scale_I) / scale_I - weight_OI
    assert part.errors[0.5] == pytest.approx((normed_NI @ error_OI.T).square().sum().item(), rel=1e-3)
    assert part.errors[0.5] < whole.errors[0.5]


def test_means_are_taken_in_float32_whatever_the_products_are_in():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(32, 32, bias=False), nn.RMSNorm(32), nn.Linear(32, 32, bias=False))
    x_BTI = torch.randn(6, 20, 32) * torch.logspace(-1, 1, 32)
    mean_I = mean_magnitudes(BlockFunction(block), x_BTI.split(2), ["2"])["2"]
    _, found = scale_block(
        BlockFunction(block), x_BTI.split(2), x_BTI.split(2), {"2": W3}, [0.5], autocast=torch.bfloat16
    )
    assert torch.equal(found[0].scale_I, scale_of(mean_I, 0.5))


def test_the_fewest_whole_sequences_that_hold_the_rows_are_spread_over_the_text():
    inputs_STD = torch.arange(8.0).view(8, 1, 1).expand(8, 5, 2)
    chosen = {rows: evenly_spaced(inputs_STD, rows)[:, 0, 0].tolist() for rows in (1, 5, 6, 20, 40, 1000)}
    assert chosen == {1: [0], 5: [0], 6: [0, 4], 20: [0, 2, 4, 6], 40: list(range(8)), 1000: list(range(8))}


def test_duo_scaling_at_equal_magnitudes_follows_the_activations_alone():
    mean_I = torch.tensor([16.0, 1.0, 4.0])
    torch.testing.assert_close(duo_scale_of(mean_I, torch.full((3,), 0.3), 0.5), scale_of(mean_I, 0.5))


def test_duo_scaling_at_ratio_zero_evens_out_the_magnitudes_of_the_weights():
    magnitude_I = torch.tensor([0.2, 0.8, 0.4])
    scaled_I = duo_scale_of(torch.rand(3) + 1, magnitude_I, 0.0) * magnitude_I
    torch.testing.assert_close(scaled_I, scaled_I[:1].expand(3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("duo_scaling", [False, True])
def test_the_unit_of_activations_does_not_change_the_scale(duo_scaling):
    mean_I, magnitude_I = torch.rand(32) + 0.1, torch.rand(32) + 0.1
    scale = (lambda m_I: duo_scale_of(m_I, magnitude_I, 0.6)) if duo_scaling else (lambda m_I: scale_of(m_I, 0.6))
    torch.testing.assert_close(scale(mean_I * 50), scale(mean_I))


def test_channels_without_activation_or_weight_keep_scales_finite():
    mean_I, magnitude_I = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.5, 0.0, 1.0])
    for ratio in RATIOS:
        scale_I = duo_scale_of(mean_I, magnitude_I, ratio)
        assert scale_I.isfinite().all()
        assert (scale_I > 0).all()


@pytest.mark.parametrize("block_size", [16, "row"])
def test_magnitudes_are_relative_to_the_largest_of_a_group(block_size):
    weights = [torch.randn(5, 40), torch.randn(3, 40)]
    expected_I = reference.relative_magnitudes(torch.cat(weights).double(), 40 if block_size == "row" else block_size)
    torch.testing.assert_close(weight_magnitudes(weights, [block_size] * 2), expected_I.float())


def test_magnitudes_are_relative_to_the_largest_of_a_tensor_with_one_scale():
    weights = [torch.randn(5, 40), torch.randn(3, 40)]
    expected_I = torch.cat([weight_OI.abs() / weight_OI.abs().max() for weight_OI in weights]).mean(0)
    torch.testing.assert_close(weight_magnitudes(weights, ["tensor"] * 2), expected_I)


def test_a_group_of_zeros_has_magnitude_zero():
    weight_OI = torch.cat([torch.zeros(2, 16), torch.ones(2, 16)], dim=1)
    assert weight_magnitudes([weight_OI], [16]).tolist() == [0.0] * 16 + [1.0] * 16


@pytest.mark.parametrize("settings", [{"rows": 0}, {"rows": True}, {"rows": 1.5}, {"duo_scaling": "both"}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Awq(**settings)
