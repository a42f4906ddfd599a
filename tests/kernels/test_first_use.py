"""A kernel whose numbers are wrong is found before a model runs on it."""

from __future__ import annotations

from dataclasses import replace

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
def test_right_numbers_pass(number_format, monkeypatch):
    monkeypatch.setattr(first_use, "TOKENS", (1, 16))
    first_use.compare(packed(number_format))


@pytest.mark.parametrize("factor", [1.05, float("nan"), 0.0])
def test_wrong_numbers_are_refused_with_the_layout_and_the_error(factor, monkeypatch):
    right = first_use.packed_linear
    monkeypatch.setattr(first_use, "packed_linear", lambda x, layer: right(x, layer) * factor)
    monkeypatch.setattr(first_use, "TOKENS", (1,))
    with pytest.raises(ArithmeticError, match=r"kernels of Layout\(.* with 1 tokens differ from plain torch by"):
        first_use.compare(packed())


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
    monkeypatch.setattr(first_use, "TOKENS", (tokens,))
    first_use.compare(joint)


def test_linears_that_differ_in_size_alone_are_of_one_kind():
    one, other = packed(), packed(rows=64)
    assert first_use._kind(one) == first_use._kind(other)
    assert first_use._kind(one) != first_use._kind(packed(MXInt(3)))
    assert first_use._kind(one) != first_use._kind(replace(one, dtype=torch.float32))


def test_each_kind_is_compared_once_and_only_on_a_gpu(monkeypatch):
    compared: list[PackedLinear] = []
    monkeypatch.setattr(first_use, "compare", compared.append)
    monkeypatch.setattr(first_use, "_compared", set())
    for _ in range(2):
        first_use.compare_once(packed())
    assert len(compared) == (1 if ON_GPU else 0)


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
