"""The walk through the decoder blocks against the model's own forward pass."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from helpers import resident
from torch import Tensor, nn

from lqer.errors import ModelError
from lqer.models.structure import find_blocks
from lqer.models.walker import walk_blocks

CPU = torch.device("cpu")


def walk(model: nn.Module, windows_WT: Tensor, batch_size: int = 2) -> list[Tensor]:
    """The outputs of the last block for every batch."""
    opened = resident(model)
    outputs: list[Tensor] = []
    hook = opened.blocks[-1].register_forward_hook(lambda block, args, output: outputs.append(output))
    for run in walk_blocks(opened, windows_WT, batch_size):
        run.forward()
    hook.remove()
    return outputs


@torch.no_grad()
def test_walked_states_through_the_rest_of_the_model_give_its_logits(architecture, random_model, windows_WT):
    model = random_model(architecture)
    walked = walk(model, windows_WT)
    blocks = find_blocks(model)[1]
    assert len(walked) == 3
    for ids_BT, output in zip(windows_WT.split(2), walked, strict=True):
        own_logits = model(ids_BT).logits
        hook = blocks[-1].register_forward_hook(lambda block, args, own, walked=output: walked)
        # The model's own states are destroyed on the way, so that only the walked ones can explain its logits.
        ruin = blocks[0].register_forward_pre_hook(lambda block, args: (torch.zeros_like(args[0]), *args[1:]))
        assert torch.equal(model(ids_BT).logits, own_logits)
        hook.remove()
        ruin.remove()


def test_a_walk_leaves_the_model_as_it_was(random_model, windows_WT):
    model = random_model("llama")
    blocks = list(model.model.layers)
    own_logits = model(windows_WT).logits
    walk(model, windows_WT)
    assert all(a is b for a, b in zip(model.model.layers, blocks, strict=True))
    assert torch.equal(model(windows_WT).logits, own_logits)


def test_blocks_are_put_back_when_the_model_cannot_be_walked(random_model, windows_WT):
    model = random_model("llama")
    blocks = list(model.model.layers)
    with pytest.raises(IndexError):
        walk(model, windows_WT + model.config.vocab_size)
    assert all(a is b for a, b in zip(model.model.layers, blocks, strict=True))


def test_an_output_that_is_not_stored_leaves_the_hidden_states_as_they_are(random_model, windows_WT):
    runs = walk_blocks(resident(random_model("llama")), windows_WT, 2)
    run = next(runs)
    states_WTD = run.hidden.states_WTD.clone()
    outputs = [run.output(batch) for batch in range(3)]
    assert torch.equal(run.hidden.states_WTD, states_WTD)
    run.forward()
    assert torch.equal(run.hidden.states_WTD, torch.cat(outputs))


def test_changes_to_a_block_reach_the_next_one(random_model, windows_WT):
    model = random_model("llama")
    opened = resident(model)
    inputs: list[Tensor] = []
    # Cloned: the states are overwritten on their way.
    opened.blocks[1].register_forward_pre_hook(lambda block, args: inputs.append(args[0].clone()))
    for run in walk_blocks(opened, windows_WT, 5):
        if run.index == 0:
            for parameter in run.block.parameters():
                nn.init.zeros_(parameter)
        run.forward()
    # A block of zeros adds nothing to its residual stream.
    assert torch.equal(inputs[0], model.model.embed_tokens(windows_WT))


class Block(nn.Module):
    def __init__(self, returns_tuple: bool):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.returns_tuple = returns_tuple

    def forward(self, hidden: Tensor) -> Tensor | tuple[Tensor, None]:
        output = hidden + self.linear(hidden)
        return (output, None) if self.returns_tuple else output


class Model(nn.Module):
    """Blocks between an embedding and a head, `step` being what the model does from one block to the next."""

    def __init__(self, returns_tuple: bool, step: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(Block(returns_tuple) for _ in range(3))
        self.step = step

    @property
    def base_model(self) -> Model:
        return self

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = self.step(block, hidden)
        return SimpleNamespace(logits=hidden)


@pytest.mark.parametrize("returns_tuple", [False, True])
def test_blocks_may_return_a_tensor_or_a_tuple(returns_tuple):
    torch.manual_seed(0)
    model = Model(returns_tuple, lambda block, hidden: block(hidden)[0] if returns_tuple else block(hidden))
    ids_BT = torch.randint(10, (2, 5))
    output = walk(model, ids_BT)[0]
    assert torch.equal(output[0] if returns_tuple else output, model(ids_BT).logits)


def test_a_model_that_changes_hidden_states_between_blocks_is_refused():
    model = Model(False, lambda block, hidden: block(hidden + 1))
    with pytest.raises(ModelError, match="Model changes the hidden states between its decoder blocks"):
        walk(model, torch.ones(1, 3, dtype=torch.long))


def test_a_model_that_passes_hidden_states_by_keyword_is_refused():
    model = Model(False, lambda block, hidden: block(hidden=hidden))
    with pytest.raises(ModelError, match="Block must receive hidden_states as its first positional argument"):
        walk(model, torch.ones(1, 3, dtype=torch.long))


def test_nan_is_left_for_the_caller_to_report(random_model, windows_WT):
    model = random_model("llama")
    model.model.embed_tokens.weight.data[windows_WT[0, 0]] = float("nan")
    assert walk(model, windows_WT)[0].isnan().any()
