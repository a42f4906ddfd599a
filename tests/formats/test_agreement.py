"""A kernel is compared with PyTorch once, and not used where it differs."""

from __future__ import annotations

import logging

import pytest
import torch

from lqer.formats import agreement
from lqer.formats.agreement import agrees


@pytest.fixture(autouse=True)
def nothing_compared(monkeypatch):
    monkeypatch.setattr(agreement, "_agreed", {})


def test_a_kind_is_compared_once():
    calls = []

    def kernel():
        calls.append(1)
        return torch.ones(3)

    assert all(agrees("a", kernel, lambda: torch.ones(3), 0.0) for _ in range(3))
    assert len(calls) == 1


@pytest.mark.parametrize("found", [torch.tensor([1.0, 1.1]), torch.tensor([1.0, float("nan")]), torch.zeros(2)])
def test_a_kernel_that_differs_is_not_used_and_named(caplog, found):
    with caplog.at_level(logging.WARNING):
        assert not agrees(("transforms", 64), lambda: found, lambda: torch.ones(2), 0.01)
    assert "the kernel of ('transforms', 64) differs from PyTorch" in caplog.text


def test_a_difference_within_the_bound_is_agreement():
    assert agrees("a", lambda: torch.tensor([1.0, 1.001]), lambda: torch.ones(2), 0.01)


def test_nothing_is_compared_while_code_is_compiled(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not agrees("a", lambda: torch.ones(2), lambda: torch.ones(2), 0.01)
    assert agreement._agreed == {}
