"""A kernel whose numbers are wrong is found before a model runs on it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from kernel_layers import DEVICE, DTYPE, ON_GPU, random_lattice, rotated_layers

from lqer.formats import Int, MXInt
from lqer.kernels import GroupedExperts, PackedExperts, PackedLinear, first_use
from lqer.kernels.joint import join


def packed(number_format=None, rows: int = 32) -> PackedLinear:
    weight = (number_format or MXInt(4)).quantize(torch.randn(rows, 128, device=DEVICE), axis=1)
    return PackedLinear.pack(weight, None, None, None, None, DTYPE)


@pytest.mark.parametrize("number_format", [MXInt(4), Int(4, 32, symmetric=False)], ids=["mxint", "int"])
def test_right_numbers_pass(number_format):
    first_use.compare(packed(number_format), (1, 16))


@pytest.mark.parametrize("factor", [1.05, float("nan"), 0.0])
def test_wrong_numbers_are_refused_with_the_layout_and_the_error(factor, monkeypatch):
    right = first_use.packed_linear
    monkeypatch.setattr(first_use, "packed_linear", lambda x, layer: right(x, layer) * factor)
    with pytest.raises(ArithmeticError, match=r"kernels of Layout\(.* with 1 tokens differ from plain torch by"):
        first_use.compare(packed(), (1,))


def test_what_is_fused_into_a_linear_is_compared_too(monkeypatch):
    (layer,) = rotated_layers([random_lattice(64, 128)], 16)
    first_use.compare_fused(layer)
    right = first_use.run_layer
    monkeypatch.setattr(first_use, "run_layer", lambda x, layer, fused: right(x, layer, fused) - fused.residual_MO)
    with pytest.raises(ArithmeticError, match=r"kernels of LatticeLayout\(.* behind a norm differ from plain torch by"):
        first_use.compare_fused(layer)


@pytest.mark.parametrize("tokens", [1, 5])
def test_what_lies_between_linears_side_by_side_does_not_count(tokens, monkeypatch):
    """Outputs end before the next linear's begin; their rotations write only their own columns."""
    joint = join(rotated_layers([random_lattice(rows, 128) for rows in (64, 32)], 0))
    first, second = joint.spec.segments
    assert first.start + first.rows < second.start
    right = first_use.packed_linear

    def poisoned(x_MI, layer):
        y_MO = right(x_MI, layer)
        y_MO[:, first.rows : second.start] = torch.inf
        return y_MO

    monkeypatch.setattr(first_use, "packed_linear", poisoned)
    first_use.compare(joint, (tokens,))


def test_linears_that_differ_in_size_alone_are_of_one_kind():
    one, other = packed(), packed(rows=64)
    assert first_use._kind(one) == first_use._kind(other)
    assert first_use._kind(one) != first_use._kind(packed(MXInt(3)))
    assert first_use._kind(one) != first_use._kind(replace(one, dtype=torch.float32))


@pytest.fixture
def compared(monkeypatch) -> list[tuple[int, ...]]:
    """The numbers of tokens of each comparison."""
    found: list[tuple[int, ...]] = []
    monkeypatch.setattr(first_use, "compare", lambda packed, counts: found.append(tuple(counts)))
    monkeypatch.setattr(first_use, "_compared", set())
    return found


def test_each_kind_is_compared_once_and_only_on_a_gpu(compared):
    for _ in range(2):
        first_use.compare_once(packed())
    assert compared == ([first_use.TOKENS] if ON_GPU else [])


def on_gpu(layer: PackedLinear) -> SimpleNamespace:
    """The layer as `compare_once` sees it where it is on a GPU."""
    workspace = SimpleNamespace(is_cuda=True, device=layer.workspace.device)
    return SimpleNamespace(spec=layer.spec, dtype=layer.dtype, input_signs_I=None, workspace=workspace)


def test_a_model_that_is_loaded_for_calls_of_one_size_is_compared_with_these_alone(compared):
    with first_use.calls_of([4096]):
        first_use.compare_once(on_gpu(packed()))
        first_use.compare_once(on_gpu(packed(rows=64)))
    assert compared == [(4096,)]
    # What is loaded later for calls of any size is compared with the numbers that are missing.
    first_use.compare_once(on_gpu(packed()))
    first_use.compare_once(on_gpu(packed()))
    assert compared == [(4096,), first_use.TOKENS]


def grouped() -> GroupedExperts:
    up, down = (PackedExperts.stack([[packed(rows=128)] * halves] * 2) for halves in (2, 1))
    return GroupedExperts(up, down, "silu")


def test_right_numbers_of_experts_pass(monkeypatch):
    monkeypatch.setattr(first_use, "TOKENS_OF_EXPERTS", (1, 3))
    first_use.compare_experts(grouped())


def test_wrong_numbers_of_experts_are_refused(monkeypatch):
    right = GroupedExperts.forward
    monkeypatch.setattr(GroupedExperts, "forward", lambda self, *given: right(self, *given) * 1.05)
    monkeypatch.setattr(first_use, "TOKENS_OF_EXPERTS", (1,))
    with pytest.raises(ArithmeticError, match=r"kernels of experts of Layout\(.* with 1 tokens differ"):
        first_use.compare_experts(grouped())
