"""Projections of groups as linears, against transformers' own module."""

from __future__ import annotations

import pytest
import torch
from mixtures import random_mixture
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear

from lqer.models.structure import block_linears, prepare_model
from lqer.nn.grouped import grouped, split_groups
from lqer.nn.stacked import stacked, stacks

GROUPS, IN, OUT = 4, 6, 5


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    projection = DeepseekV4GroupedLinear(IN, GROUPS * OUT, GROUPS)
    return nn.ModuleDict({"other": nn.Linear(IN, OUT), "projection": projection})


@torch.no_grad()
@pytest.mark.parametrize("shape", [(7,), (2, 3)])
def test_linears_of_the_groups_compute_what_the_module_computes(model, shape):
    x = torch.randn(*shape, GROUPS, IN)
    expected = model["projection"](x)
    split_groups(model)
    names = {name for name, one in model.named_modules() if type(one) is nn.Linear}
    assert names == {"other", *(f"projection.{group}" for group in range(GROUPS))}
    torch.testing.assert_close(model["projection"](x), expected, rtol=1e-5, atol=1e-6)


def test_a_linear_with_groups_that_computes_something_else_is_left(model):
    class Reversed(DeepseekV4GroupedLinear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flip(-2))

    class Plain(nn.Linear):
        n_groups = 2

    model["reversed"], model["plain"] = Reversed(IN, GROUPS * OUT, GROUPS), Plain(IN, OUT)
    assert [name for name, *_ in grouped(model)] == ["projection"]


def test_pieces_are_put_together_again(model):
    places, shapes = stacks(model), {name: parameter.shape for name, parameter in model.named_parameters()}
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    split_groups(model)
    found = stacked(dict(model.named_parameters()), places, shapes)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_a_group_is_a_linear_like_any_other():
    model = random_mixture("deepseek_v4")
    weight = model.model.layers[1].self_attn.o_a_proj.weight.detach().clone()
    prepare_model(model)
    linears = block_linears(model.model.layers[1])
    for group, rows in enumerate(weight.chunk(2)):
        assert torch.equal(linears[f"self_attn.o_a_proj.{group}"].weight, rows)
