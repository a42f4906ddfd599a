"""Experts outside of transformers' registry: split ones against the code of the modules that they were."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from lqer.nn.experts import choices, count, put_together, run_experts
from lqer.nn.stacked import split_experts, stacked, stacks
from lqer.nn.unregistered import registered_class

EXPERTS, WIDTH, INSIDE, TOKENS = 3, 8, 4, 5
CONFIG = SimpleNamespace(
    num_local_experts=EXPERTS, n_routed_experts=EXPERTS, zero_expert_num=2, hidden_size=WIDTH, hidden_act="silu",
    intermediate_size=INSIDE, moe_intermediate_size=INSIDE, expert_ffn_hidden_size=INSIDE,
)  # fmt: skip
ROUTED = {"longcat": lambda: LongcatFlashExperts(CONFIG), "step": lambda: Step3p7Experts(CONFIG, swiglu_limit=0.3)}


def filled(experts: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.requires_grad_(False).copy_(torch.randn(parameter.shape, generator=generator))
    return experts


def split_of(experts: nn.Module) -> nn.Module:
    split = copy.deepcopy(experts)
    split_experts(split)
    return split


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ROUTED)
def test_routed_tokens_give_what_the_modules_own_code_gives(kind):
    own = filled(ROUTED[kind]())
    split = split_of(own)
    index_TK = torch.tensor([(0, 1), (2, 0), (1, 2), (2, 1), (0, 2)])
    inputs = random(TOKENS, WIDTH), index_TK, random(TOKENS, 2)
    torch.testing.assert_close(split(*inputs), own(*inputs))


def test_tokens_sent_beyond_the_experts_are_passed_on_with_the_routers_weight():
    own = filled(LongcatFlashExperts(CONFIG))
    split, x_TD = split_of(own), random(2, WIDTH)
    index_TK, weights_TK = torch.tensor([(4, 3), (3, 1)]), torch.tensor([(0.5, 0.25), (2.0, 1.0)])
    found = split(x_TD, index_TK, weights_TK)
    torch.testing.assert_close(found[0], 0.75 * x_TD[0])
    torch.testing.assert_close(found, own(x_TD, index_TK, weights_TK))
    assert (count(split), choices(split)) == (EXPERTS, EXPERTS + 2)


def test_of_rows_of_all_experts_those_that_are_not_zero_are_run_in_the_order_of_tokens():
    own = filled(Llama4TextExperts(CONFIG))
    split, seen = split_of(own), []
    split.register_forward_pre_hook(lambda module, args: seen.append(args))
    x_ETD = random(EXPERTS, 2, WIDTH)
    x_ETD[0, 0] = x_ETD[1] = 0
    found = split(x_ETD.flatten(0, 1))
    torch.testing.assert_close(found, own(x_ETD.flatten(0, 1)))
    x_PD, index_P1, weights_P1 = seen[0]
    assert torch.equal(x_PD, torch.stack([x_ETD[2, 0], x_ETD[0, 1], x_ETD[2, 1]]))
    assert index_P1.tolist() == [[2], [0], [2]]
    assert weights_P1.tolist() == [[1], [1], [1]]


def test_rows_of_zeros_alone_give_zeros():
    split = split_of(filled(Llama4TextExperts(CONFIG)))
    assert not split(torch.zeros(EXPERTS * 2, WIDTH)).any()


@pytest.mark.parametrize("own", [Llama4TextExperts, LongcatFlashExperts])
def test_linears_are_stacked_again_as_they_were_but_for_rows_that_nothing_reads(own):
    model = nn.Module()
    model.experts = filled(own(CONFIG))
    places, shapes = stacks(model), {name: parameter.shape for name, parameter in model.named_parameters()}
    before = dict(model.named_parameters())
    split_experts(model)
    found = stacked(dict(model.named_parameters()), places, shapes)
    assert found.keys() == before.keys()
    for name, parameter in before.items():
        assert torch.equal(found[name][:EXPERTS], parameter[:EXPERTS])
        assert not found[name][EXPERTS:].any()


def test_other_modules_with_such_weights_are_no_experts():
    def module(up: tuple[int, ...], down: tuple[int, ...], **extra: Tensor) -> nn.Module:
        found = Llama4TextExperts(CONFIG)
        found.gate_up_proj, found.down_proj = nn.Parameter(torch.zeros(up)), nn.Parameter(torch.zeros(down))
        for name, tensor in extra.items():
            found.register_parameter(name, nn.Parameter(tensor))
        return found

    assert registered_class(module((3, 8, 8), (3, 4, 8))) is not None
    assert registered_class(module((3, 8, 6), (3, 4, 8))) is None
    assert registered_class(module((2, 8, 8), (3, 4, 8))) is None
    assert registered_class(module((3, 8, 8), (3, 4, 8), bias=torch.zeros(3))) is None
    assert registered_class(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("own", [Llama4TextExperts, LongcatFlashExperts])
def test_one_module_in_the_place_of_all_experts_is_given_those_with_weights_alone(own):
    split = split_of(filled(own(CONFIG)))
    one_by_one, seen = copy.deepcopy(split), []

    class Together(nn.Module):
        def forward(self, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, activate: object) -> Tensor:
            seen.append(index_TK)
            return run_experts(one_by_one, x_TD, index_TK, weights_TK)

    put_together(split, Together())
    x_TD = random(EXPERTS, WIDTH)
    inputs = (x_TD,) if own is Llama4TextExperts else (x_TD, torch.tensor([(0, 4), (3, 2), (1, 0)]), random(EXPERTS, 2))
    torch.testing.assert_close(split(*inputs), one_by_one(*inputs))
    assert len(seen) == 1
