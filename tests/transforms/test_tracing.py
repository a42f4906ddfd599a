from __future__ import annotations

import pytest
import torch
from torch import nn

from lqer.transforms.tracing import enough_to_probe, trace, watched_inputs


class Attention(nn.Module):
    """Two linears on one tensor, one on another."""

    def __init__(self):
        super().__init__()
        self.norm, self.q, self.k, self.o = nn.RMSNorm(6), nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 6)

    def forward(self, x_BTI):
        normed_BTI = self.norm(x_BTI)
        return self.o(self.q(normed_BTI) + self.k(normed_BTI))


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Attention()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 5, 6, generator=generator) for size in (2, 3)]


def test_linears_called_with_one_tensor_are_one_site(module, batches):
    seen = trace(module, lambda: module(batches[0]))
    assert seen.sites() == [("q", "k"), ("o",)]
    assert seen.norms_before("k") == ["norm"]
    assert seen.norms_before("o") == []


def test_the_input_of_every_call_is_handed_on(module, batches):
    seen = {"q": [], "o": []}
    with watched_inputs(module, {name: inputs.append for name, inputs in seen.items()}):
        for x_BTI in batches:
            module(x_BTI)
    module(batches[0])
    for x_BTI, q_input, o_input in zip(batches, seen["q"], seen["o"], strict=True):
        normed_BTI = module.norm(x_BTI)
        torch.testing.assert_close(q_input, normed_BTI)
        torch.testing.assert_close(o_input, module.q(normed_BTI) + module.k(normed_BTI))


def test_nobody_watches_after_a_call_that_fails(module):
    with pytest.raises(RuntimeError), watched_inputs(module, {"q": lambda x: None}):
        module(torch.zeros(1, 5, 7))
    assert not any(child._forward_pre_hooks for child in module.modules())


def test_a_block_is_probed_with_the_fewest_sequences_that_hold_enough_tokens():
    lengths = {(8, 100): 6, (3, 100): 3, (4, 512): 1, (4, 2048): 1, (9, 64): 8}
    found = {shape: len(enough_to_probe(torch.zeros(*shape, 1))) for shape in lengths}
    assert found == lengths
