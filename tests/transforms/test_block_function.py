from __future__ import annotations

import pytest
import torch
from helpers import first_block
from torch import nn

from lqer.formats import Int
from lqer.transforms.block_function import BlockFunction, straight_through


def test_without_replacements_it_is_the_block(random_model, architecture, windows_WT):
    model = random_model(architecture)
    block, call, hidden = first_block(model, windows_WT)
    outputs = []
    hook = block.register_forward_hook(lambda _, args, output: outputs.append(output))
    with torch.no_grad():
        model.base_model(input_ids=windows_WT, use_cache=False)
        hook.remove()
        expected = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
        assert torch.equal(call({}, hidden), expected)
        copies = {name: parameter.clone() for name, parameter in block.named_parameters()}
        assert torch.equal(call(copies, hidden), expected)


def test_a_replaced_weight_is_used_and_the_module_keeps_its_own():
    linear = nn.Linear(4, 3)
    kept = linear.weight.clone()
    x, weight = torch.randn(2, 4), torch.randn(3, 4)
    assert torch.equal(BlockFunction(linear)({"weight": weight}, x), torch.nn.functional.linear(x, weight, linear.bias))
    assert torch.equal(linear.weight, kept)


def test_gradients_reach_what_was_handed_in_and_nothing_else():
    linear = nn.Linear(4, 3)
    weight = torch.randn(3, 4, requires_grad=True)
    BlockFunction(linear)({"weight": weight}, torch.randn(2, 4)).sum().backward()
    assert weight.grad is not None
    assert linear.weight.grad is None
    assert linear.bias.grad is None


def test_a_misspelt_parameter_is_named():
    with pytest.raises(ValueError, match=r"wieght is not a parameter of Linear"):
        BlockFunction(nn.Linear(4, 3))({"wieght": torch.zeros(3, 4)}, torch.zeros(1, 4))


def test_inputs_are_rounded_per_token_only_where_a_format_is_named():
    block = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(2, 3, 8)
    activation = Int(bits=4, block_size="row")
    rounded = BlockFunction(block, activations={"1": activation})({}, x)
    inner = block[0](x)
    tokens = torch.stack([activation.quantize(token).dequantize() for token in inner.reshape(6, 8)]).view(2, 3, 8)
    torch.testing.assert_close(rounded, block[1](tokens))
    assert not block[1]._forward_pre_hooks


def test_hooks_are_gone_even_after_a_failure():
    block = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(RuntimeError):
        BlockFunction(block, activations={"0": Int(bits=4)})({}, torch.zeros(2, 5))
    assert not block[0]._forward_pre_hooks


def test_gradients_pass_straight_through_a_rounding():
    x = torch.randn(5, requires_grad=True)
    factors = torch.randn(5)
    y = straight_through(x, torch.round)
    assert torch.equal(y, x.detach().round())
    (y * factors).sum().backward()
    assert torch.equal(x.grad, factors)


def test_arguments_of_one_sequence_are_expanded_to_the_batch():
    class Strict(nn.Linear):
        def forward(self, x_BTD, shared, *, added):
            assert shared.shape == (1, 4)
            assert added.shape == x_BTD.shape
            return x_BTD + added

    added = torch.randn(1, 3, 4)
    call = BlockFunction(Strict(1, 1), (torch.ones(1, 4),), {"added": added}, per_sequence={1})
    x_BTD = torch.randn(5, 3, 4)
    assert torch.equal(call.without_rounding()._arguments(5)[1]["added"], added.expand(5, 3, 4))
    assert torch.equal(call({}, x_BTD), x_BTD + added)


def test_a_matrix_that_autocast_would_cast_back_is_used_as_it_is():
    linear = nn.Linear(4, 3, bias=False)
    x = torch.randn(2, 4)
    narrow = torch.randn(3, 4).bfloat16()
    found = []
    for weight in (narrow, narrow.float()):
        weight.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = BlockFunction(linear)({"weight": weight}, x)
        output.float().sum().backward()
        found.append((output.detach(), weight.grad))
    (output, gradient), (expected, expected_gradient) = found
    assert torch.equal(output, expected)
    assert gradient.dtype == torch.bfloat16
    assert torch.equal(gradient.float(), expected_gradient)
