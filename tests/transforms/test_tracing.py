from __future__ import annotations

import pytest
import torch
from torch import nn

from lqer.transforms.tracing import UntilCalled, enough_to_probe, output_stays, trace, watched_inputs


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


def finished(module, names, runs):
    """How often a module came to its end, and the inputs that were seen of the named ones, after each of the runs."""
    seen, ends, found = [], [], []
    end = module.register_forward_hook(lambda *_: ends.append(1))
    until = UntilCalled(module, names)
    for run in runs:
        with watched_inputs(module, dict.fromkeys(names, seen.append)):
            until.run(run)
        found.append((len(ends), len(seen)))
    end.remove()
    assert not any(child._forward_pre_hooks for child in module.modules())
    return found


def test_a_run_ends_where_all_that_is_asked_for_was_seen(module, batches):
    runs = [lambda x_BTI=x_BTI: module(x_BTI) for x_BTI in (*batches, batches[0])]
    assert finished(module, ["q", "k"], runs) == [(1, 2), (1, 4), (1, 6)]
    assert finished(module, ["o"], runs) == [(1, 1), (1, 2), (1, 3)]


def test_what_is_called_twice_or_never_is_run_to_its_end(module, batches):
    x_BTI = batches[0]
    twice = [lambda: (module.k(x_BTI), module(x_BTI))] * 2
    assert finished(module, ["q", "k"], twice) == [(1, 3), (2, 6)]
    module.never = nn.Linear(6, 4)
    assert finished(module, ["q", "never"], [lambda: module(x_BTI)] * 2) == [(1, 1), (2, 2)]


def test_a_module_that_a_later_run_calls_no_more_lets_it_end(module, batches):
    x_BTI = batches[0]
    runs = [lambda: module(x_BTI), lambda: module.o(module.q(x_BTI))]
    assert finished(module, ["q", "k"], runs) == [(1, 2), (1, 3)]


def test_a_failure_is_no_end(module):
    with pytest.raises(RuntimeError):
        UntilCalled(module, ["o"]).run(lambda: module(torch.zeros(1, 5, 7)))
    assert not any(child._forward_pre_hooks for child in module.modules())


def test_a_block_is_probed_with_the_fewest_sequences_that_hold_enough_tokens():
    lengths = {(8, 100): 6, (3, 100): 3, (4, 512): 1, (4, 2048): 1, (9, 64): 8}
    found = {shape: len(enough_to_probe(torch.zeros(*shape, 1))) for shape in lengths}
    assert found == lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_leaves_a_blocks_output_as_it_was_and_another_function_does_not(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden_BTD, branches_BTD = (torch.randn(2, 8, 16, generator=generator) for _ in range(2))
    # Far smaller than the hidden states, as in a deep model: the branches are what counts.
    output_BTD = (hidden_BTD + 0.1 * branches_BTD).to(dtype)
    assert output_stays(output_BTD * (1 + torch.finfo(dtype).eps), output_BTD, hidden_BTD)
    assert not output_stays((hidden_BTD + 0.1 * branches_BTD.flip(0)).to(dtype), output_BTD, hidden_BTD)
