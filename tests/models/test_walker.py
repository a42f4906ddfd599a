"""The walk through the decoder blocks against the model's own forward pass."""

from __future__ import annotations

import itertools
from collections import UserDict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import build_gemma4, resident
from torch import Tensor, nn

from lqer.errors import ModelError
from lqer.models.loaders import OpenedModel
from lqer.models.structure import find_blocks
from lqer.models.walker import embed, walk_blocks

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


@torch.no_grad()
def test_keys_and_values_that_blocks_share_are_handed_on_batch_by_batch(windows_WT):
    model = build_gemma4(shared=3)
    opened = resident(model)
    outputs: list[Tensor] = []
    opened.blocks[-1].register_forward_hook(lambda block, args, output: outputs.append(output.clone()))
    runs = walk_blocks(opened, windows_WT, 2)
    for run in runs:
        # A look at an output leaves what blocks have handed on as it is.
        run.output(0)
        run.forward()
    del outputs[0]
    walked = outputs.copy()
    for ids_BT, output_BTD in zip(windows_WT.split(2), walked, strict=True):
        model(ids_BT, use_cache=False)
        torch.testing.assert_close(output_BTD, outputs[-1], rtol=1e-5, atol=1e-6)


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
    with pytest.raises(
        ModelError, match="LlamaForCausalLM cannot be run block by block: IndexError: index out of range"
    ):
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


@pytest.mark.parametrize("name", [
    "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight",
    "model.layers.0.input_layernorm.weight",
])  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_parameter_that_is_not_finite_is_named_with_its_dtype(random_model, windows_WT, name, value):
    model = random_model("llama").to(torch.bfloat16)
    model.get_parameter(name).data.view(-1)[3] = value
    with pytest.raises(ModelError, match=rf"model: {name} holds NaN or infinities \(in bfloat16\)"):
        walk(model, windows_WT)


class TestArgumentsOfBlocks:
    """A model that passes its blocks more than hidden states: `step` gets the block, its input, the token ids."""

    @pytest.fixture
    def windows_WT(self) -> Tensor:
        return torch.randint(10, (5, 4), generator=torch.Generator().manual_seed(2))

    def model(self, arguments: Callable[[Tensor], dict]) -> Model:
        torch.manual_seed(0)
        model = Model(False, lambda block, hidden: block(hidden, **arguments(model.ids_BT)))
        model.register_forward_pre_hook(
            lambda module, args, kwargs: setattr(module, "ids_BT", kwargs.get("input_ids", *args)), with_kwargs=True
        )
        for block in model.blocks:
            block.forward = partial(self.forward, block)
        return model

    @staticmethod
    def forward(block: nn.Module, hidden_BTD: Tensor, added: Tensor | None = None, written: Any = None) -> Tensor:
        if written is not None:
            written["latest"] = hidden_BTD
        return hidden_BTD + block.linear(hidden_BTD) + (0 if added is None else added)

    @torch.no_grad()
    @pytest.mark.parametrize("batch_size", [1, 2, 5])
    def test_those_that_depend_on_the_tokens_are_used_with_their_own_batch(self, windows_WT, batch_size):
        model = self.model(lambda ids_BT: {"added": ids_BT[..., None].float()})
        walked = walk(model, windows_WT, batch_size)
        assert torch.equal(torch.cat(walked), torch.cat([model(ids).logits for ids in windows_WT.split(batch_size)]))

    def test_blocks_of_such_models_have_no_call_for_any_windows(self, windows_WT):
        hidden = embed(self.opened(lambda ids_BT: {"added": ids_BT[..., None].float()}), windows_WT.split(2))
        with pytest.raises(ModelError, match="arguments that depend on the batch"):
            hidden.call_of_one(1)

    def test_an_argument_that_depends_on_the_number_of_windows_alone_is_stored_once(self, windows_WT):
        hidden = embed(
            self.opened(lambda ids_BT: {"added": torch.ones(len(ids_BT) * 4, 1, 1)}), windows_WT[:4].split(2)
        )
        assert hidden.calls[0][0] is hidden.calls[0][1]
        with pytest.raises(ModelError, match="arguments that depend on the batch"):
            hidden.call_of_one(0)

    def test_an_argument_that_broadcasts_suits_any_windows(self, windows_WT):
        hidden = embed(self.opened(lambda ids_BT: {"added": torch.ones(1, 4, 1)}), windows_WT.split(2))
        assert torch.equal(hidden.call_of_one(0).kwargs["added"], torch.ones(1, 4, 1))
        assert hidden.calls[0][0] is hidden.calls[0][1]
        assert not hidden.call_of_one(0).per_window

    def test_an_argument_with_equal_rows_for_the_windows_is_known_to_have_one_per_window(self, windows_WT):
        opened = self.opened(lambda ids_BT: {"alone": torch.ones(1), "added": torch.ones(len(ids_BT), 4, 1)})
        call = embed(opened, windows_WT[:4].split(2)).call_of_one(0)
        assert [list(call.kwargs)[i] for i in call.per_window] == ["added"]

    @torch.no_grad()
    @pytest.mark.parametrize("mapping", [dict, UserDict])
    def test_what_a_block_writes_into_an_argument_reaches_no_other_block(self, windows_WT, mapping):
        shared = mapping()
        model = self.model(lambda ids_BT: {"written": shared})
        walked = walk(model, windows_WT)
        assert not shared
        assert torch.equal(torch.cat(walked), torch.cat([model(ids).logits for ids in windows_WT.split(2)]))

    def opened(self, arguments: Callable[[Tensor], dict]) -> OpenedModel:
        return resident(self.model(arguments))


def test_a_block_called_twice_in_a_pass_is_refused():
    model = Model(False, lambda block, hidden: block(block(hidden)))
    with pytest.raises(ModelError, match="Model calls decoder block 0 2 times in one pass"):
        walk(model, torch.ones(1, 3, dtype=torch.long))


def test_a_block_that_is_not_called_is_refused():
    steps = itertools.count()
    model = Model(False, lambda block, hidden: hidden if next(steps) % 3 == 1 else block(hidden))
    with pytest.raises(ModelError, match="Model calls decoder block 1 0 times in one pass"):
        walk(model, torch.ones(1, 3, dtype=torch.long))


def test_hidden_states_of_four_dimensions_are_refused():
    model = Model(False, lambda block, hidden: block(hidden))
    model.embedding = nn.Sequential(model.embedding, nn.Unflatten(-1, (1, 4)))
    with pytest.raises(ModelError, match=r"hidden states of Model have shape \[1, 3, 1, 4\]"):
        walk(model, torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize("output", [None, {}, torch.zeros(1, 3, 2)])
def test_a_block_that_returns_no_hidden_states_is_refused(output):
    model = Model(False, lambda block, hidden: block(hidden))
    model.blocks[0].forward = lambda hidden: output
    with pytest.raises(ModelError, match=r"blocks\.0 does not return hidden states of the shape it receives"):
        walk(model, torch.ones(1, 3, dtype=torch.long))


def test_blocks_may_return_a_list():
    model = Model(True, lambda block, hidden: block(hidden)[0])
    for block in model.blocks:
        block.forward = lambda hidden, block=block: [hidden + block.linear(hidden)]
    ids_BT = torch.randint(10, (2, 5))
    assert torch.equal(walk(model, ids_BT)[0][0], model(ids_BT).logits)
