"""Modules of linears that read the same input run as one, in every order of calls, and compiled.

Shapes: B sequences, T tokens, I in_features, O out_features.
"""

from __future__ import annotations

import copy

import pytest
import torch
from kernel_layers import DEVICE, DTYPE, ON_GPU, build_layer
from torch import Tensor, nn

from lqer.formats import Int, MXInt
from lqer.kernels import TritonLinear, packed_linear
from lqer.kernels.siblings import SiblingLinear, Siblings

COLUMNS, ROWS = 256, (128, 64, 80)


FOUR = MXInt(4)


def single_linears(number_format=FOUR, activation=None) -> list[TritonLinear]:
    ranks = (16, 32, 16)
    return [
        TritonLinear(build_layer(number_format, rows, COLUMNS, rank, activation, bias=rank == 16).packed)
        for rows, rank in zip(ROWS, ranks, strict=True)
    ]


def tokens(seed: int = 0, count: int = 3) -> Tensor:
    return torch.randn(1, count, COLUMNS, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


class Attentive(nn.Module):
    """Calls its linears with one tensor, as attention does."""

    def __init__(self, linears: list[TritonLinear]):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = linears

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return torch.cat([q.sin(), k, v], dim=-1)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Counts calls of the operator: an element for each, the rows that it computes."""
    made: list[int] = []

    def counted(x, packed):
        made.append(packed.spec.layout.rows)
        return packed_linear(x, packed)

    monkeypatch.setattr("lqer.kernels.module.packed_linear", counted)
    return made


@torch.no_grad()
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_one_call_computes_the_outputs_of_all_in_whatever_order_they_are_asked_for(order, calls):
    single = single_linears()
    siblings, x = Siblings(single).linears, tokens()
    found = {place: siblings[place](x) for place in order}
    assert len(calls) == 1
    for place, linear in enumerate(single):
        torch.testing.assert_close(found[place], linear(x), rtol=2e-3, atol=2e-3)


@torch.no_grad()
def test_a_call_with_another_tensor_or_a_second_call_computes_anew(calls):
    single = single_linears()
    (q, k, v), x, other = Siblings(single).linears, tokens(), tokens(1)
    torch.testing.assert_close(q(x), single[0](x), rtol=2e-3, atol=2e-3)
    # An equal tensor is not the same one.
    torch.testing.assert_close(k(x.clone()), single[1](x), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(k(other), single[1](other), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(v(x), single[2](x), rtol=2e-3, atol=2e-3)
    assert len([rows for rows in calls if rows > max(ROWS)]) == 4
    calls.clear()
    for _ in range(2):
        torch.testing.assert_close(q(other), single[0](other), rtol=2e-3, atol=2e-3)
    assert len([rows for rows in calls if rows > max(ROWS)]) == 2


@torch.no_grad()
def test_a_tensor_that_was_changed_in_place_between_two_calls_is_another_one():
    single = single_linears()
    (q, k, _), x = Siblings(single).linears, tokens()
    q(x)
    x.mul_(-3)
    torch.testing.assert_close(k(x), single[1](x), rtol=2e-3, atol=2e-3)


@torch.inference_mode()
def test_siblings_run_in_inference_mode(calls):
    siblings, x = Siblings(single_linears()).linears, tokens() * 1
    for linear in siblings:
        linear(x)
    assert len(calls) == 1


@torch.no_grad()
def test_nothing_refers_to_input_and_outputs_once_all_are_handed_out():
    siblings = Siblings(single_linears())
    x = tokens()
    for linear in siblings.linears:
        linear(x)
    assert siblings._x is None
    assert siblings._y is None


@torch.no_grad()
@pytest.mark.parametrize("number_format", [MXInt(4), Int(4, 128)])
def test_names_and_the_state_dict_stay_and_nothing_is_stored_twice(number_format):
    single = Attentive(single_linears(number_format))
    before = {name: tensor.clone() for name, tensor in single.state_dict().items() if "workspace" not in name}
    names = [name for name, _ in single.named_modules()]
    siblings = Siblings([single.q_proj, single.k_proj, single.v_proj])
    joined = Attentive(list(siblings.linears))
    assert [name for name, _ in joined.named_modules()] == names
    after = {name: tensor for name, tensor in joined.state_dict().items() if "workspace" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    shared = {tensor.untyped_storage().data_ptr() for tensor in siblings.joint.buffers()}
    assert {tensor.untyped_storage().data_ptr() for tensor in joined.buffers()} == shared


@torch.no_grad()
def test_copies_and_moved_modules_share_their_tensors_again():
    single = single_linears()
    joined, x = Attentive(list(Siblings(single).linears)), tokens()
    expected = joined(x)
    other = copy.deepcopy(joined)
    moved = copy.deepcopy(joined).to("cpu").to(DEVICE) if ON_GPU else copy.deepcopy(joined)._apply(torch.clone)
    for model in (other, moved):
        assert isinstance(model.k_proj, SiblingLinear)
        joint = model.k_proj._siblings.joint
        assert joint is not joined.k_proj._siblings.joint
        assert joint is model.q_proj._siblings.joint
        assert model.k_proj.words.untyped_storage().data_ptr() == joint.words.untyped_storage().data_ptr()
        assert torch.equal(model(x), expected)


@torch.no_grad()
def test_a_compiled_module_holds_one_call_of_the_operator():
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    single = Attentive(single_linears(activation=MXInt(8)))
    joined = Attentive(list(Siblings([single.q_proj, single.k_proj, single.v_proj]).linears))
    compiled = torch.compile(joined, fullgraph=True, backend=keep)
    for seed in range(2):
        torch.testing.assert_close(compiled(tokens(seed)), single(tokens(seed)), rtol=5e-3, atol=5e-3)
    assert len(graphs) == 1
    assert sum("packed_linear" in str(node.target) for node in graphs[0].graph.nodes) == 1
    # Siblings leave nothing behind that the graph would have to write.
    assert joined.q_proj._siblings._y is None


@torch.no_grad()
def test_blocks_of_one_shape_are_compiled_once():
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    blocks = [Attentive(list(Siblings(single_linears()).linears)) for _ in range(3)]
    run = torch.compile(Attentive.forward, fullgraph=True, backend=keep)
    for block in blocks:
        torch.testing.assert_close(run(block, tokens()), block(tokens()))
    assert len(graphs) == 1


@pytest.mark.skipif(not ON_GPU, reason="records a CUDA graph")
@torch.no_grad()
def test_a_cuda_graph_of_a_compiled_module_gives_the_outputs_of_the_linears():
    single = Attentive(single_linears(activation=MXInt(8)))
    joined = Attentive(list(Siblings([single.q_proj, single.k_proj, single.v_proj]).linears))
    compiled = torch.compile(joined, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        x = tokens(seed, count=1)
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(x).clone(), single(x), rtol=2e-2, atol=2e-2)
