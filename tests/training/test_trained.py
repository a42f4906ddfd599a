"""Trained tensors: where they start, what they are stored as, and gradients of weights decoded from fixed codes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lqer.formats import E8P, Codebook, Int, MXInt, NormalFloat, Passthrough, Trellis
from lqer.nn.linear import QuantizedLinear
from lqer.training.trained import Decoded, Replaced, Trained, compute_with

FORMATS = [
    Int(3, block_size=16),
    Int(4, block_size=16, symmetric=True, scale_dtype="bfloat16"),
    Int(4, block_size="tensor"),
    E8P(2),
    E8P(4, block_size="row", scale_dtype="float16"),
    NormalFloat(4, block_size=16),
    Codebook(2, dimension=2, group_size=256, block_size=16),
    Passthrough("float16"),
    Trellis(2),
]


@pytest.fixture
def weight_OI():
    return torch.randn(32, 48, generator=torch.Generator().manual_seed(0))


def trained_parts(quantized):
    parts = quantized.format.trainable_parts
    return {part: Trained.elementwise(quantized.parts[part], "scales") for part in parts}


@pytest.mark.parametrize("number_format", FORMATS, ids=repr)
def test_training_starts_at_what_is_stored_bit_for_bit(number_format, weight_OI):
    quantized = number_format.quantize(weight_OI)
    trained = trained_parts(quantized)
    decoded = Decoded(quantized, trained, torch.float32)
    for training in (True, False):
        decoded.train(training)
        assert torch.equal(decoded(weight_OI), quantized.dequantize())
    for part, one in trained.items():
        stored = one.stored(one.parameter)
        assert torch.equal(stored, quantized.parts[part])
        assert stored.dtype == quantized.parts[part].dtype


@pytest.mark.parametrize("number_format", FORMATS, ids=repr)
def test_the_gradient_is_that_of_finite_differences(number_format, weight_OI):
    quantized = number_format.quantize(weight_OI)
    trained = trained_parts(quantized)
    decoded = Decoded(quantized, trained, torch.float32)
    direction_OI = torch.randn(weight_OI.shape, generator=torch.Generator().manual_seed(1))
    (decoded(weight_OI) * direction_OI).sum().backward()
    for one in trained.values():
        step = torch.randn(one.parameter.shape, generator=torch.Generator().manual_seed(2))
        expected = float((one.parameter.grad * step).sum())
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                one.parameter.copy_(sign * 2**-6 * step)
                values.append(float((decoded(weight_OI).double() * direction_OI).sum()))
        assert (values[0] - values[1]) / 2**-5 == pytest.approx(expected, rel=1e-3, abs=1e-2)


@pytest.mark.parametrize("number_format", FORMATS, ids=repr)
def test_the_number_of_trained_values_is_known_in_advance(number_format, weight_OI):
    quantized = number_format.quantize(weight_OI)
    values = sum(quantized.parts[part].numel() for part in number_format.trainable_parts)
    assert number_format.trainable_values(*weight_OI.shape) == values


def test_powers_of_two_are_not_trained():
    assert not MXInt(4).trainable_parts
    assert MXInt(4).trainable_values(32, 48) == 0


def test_a_relative_step_moves_by_a_share_of_the_root_mean_square():
    tensor = torch.tensor([3.0, -4.0, 0.0, 0.0], dtype=torch.bfloat16)
    trained = Trained.relative(tensor, "norms")
    moved = trained.stored(trained.parameter + 0.5)
    assert moved.dtype == torch.bfloat16
    assert moved.tolist() == [4.25, -2.75, 1.25, 1.25]
    zeros = Trained.relative(torch.zeros(3), "norms")
    assert zeros.stored(zeros.parameter + 0.5).tolist() == [0.5] * 3


def test_an_elementwise_step_keeps_zeros():
    trained = Trained.elementwise(torch.tensor([2.0, 0.0]), "scales")
    assert trained.stored(trained.parameter + 0.25).tolist() == [2.5, 0.0]


def test_validation_sees_the_stored_value_and_training_the_float32_one():
    trained = Trained(torch.ones(2), torch.bfloat16, "low_rank")
    with torch.no_grad():
        trained.parameter += 2**-10
    assert trained.train()().tolist() == [1 + 2**-10] * 2
    assert trained.eval()().tolist() == [1.0] * 2


def test_a_weight_is_decoded_where_it_is_used_and_its_dense_copy_let_go(weight_OI):
    quantized = Int(4, block_size=16).quantize(weight_OI)
    linear = QuantizedLinear(quantized.dequantize(), None, None, None, None)
    x_TI = torch.randn(3, 48)
    expected = linear(x_TI)
    trained = trained_parts(quantized)
    compute_with(linear, "weight", Decoded(quantized, trained, torch.float32))
    assert torch.equal(linear(x_TI), expected)
    assert not [name for name, buffer in linear.named_buffers() if buffer.numel() == weight_OI.numel()]
    linear(x_TI).sum().backward()
    assert trained["scales"].parameter.grad is not None


def test_part_of_a_tensor_can_be_trained():
    module = nn.Module()
    module.register_buffer("low_rank_a", torch.arange(6.0).reshape(2, 3))
    first, rest = module.low_rank_a.split([1, 2], dim=1)
    trained = Trained(first, torch.bfloat16, "low_rank")
    compute_with(module, "low_rank_a", Replaced(trained, torch.float32, rest, axis=1))
    with torch.no_grad():
        trained.parameter += 1
    assert module.low_rank_a.tolist() == [[1, 1, 2], [4, 4, 5]]


def test_parts_that_are_not_trained_are_read_as_stored(weight_OI):
    quantized = Int(4, block_size=16).quantize(weight_OI)
    doubled = replace(quantized, parts=quantized.parts | {"scales": 2 * quantized.parts["scales"]})
    trained = Trained.elementwise(quantized.parts["scales"], "scales")
    with torch.no_grad():
        trained.parameter += 1
    assert torch.equal(Decoded(quantized, {"scales": trained}, torch.float32)(weight_OI), doubled.dequantize())
