"""How a model calls its blocks: what is recorded, handed on from block to block, and refused."""

from __future__ import annotations

import itertools
import math
from collections import UserDict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import resident, walk
from torch import Tensor, nn

from lqer.errors import ModelError
from lqer.models.loaders import OpenedModel
from lqer.models.walker import embed, walk_blocks


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

    @pytest.mark.parametrize("mapping", [dict, UserDict])
    def test_a_mapping_that_blocks_only_read_suits_any_windows(self, windows_WT, mapping):
        tables = mapping(tables=(torch.ones(1, 4, 1), torch.zeros(1, 4, 1)))
        opened = self.opened(lambda ids_BT: {"read": tables})
        for block in opened.blocks:
            block.forward = lambda hidden_BTD, read, block=block: block.linear(hidden_BTD) * read["tables"][0]
        run = next(walk_blocks(opened, windows_WT, 2))
        run.forward()
        assert torch.equal(run.hidden.call_of_one(1).kwargs["read"]["tables"][0], torch.ones(1, 4, 1))

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


def with_streams(*sizes: int) -> Model:
    """A model whose blocks get hidden states (B, T, *sizes, 4), copies of the embedding."""
    torch.manual_seed(0)
    model = Model(False, lambda block, hidden: block(hidden))
    model.embedding = nn.Sequential(model.embedding, Streams(sizes))
    return model


class Streams(nn.Module):
    def __init__(self, sizes: tuple[int, ...]):
        super().__init__()
        self.sizes = sizes

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        streams = hidden_BTD[:, :, None] * torch.arange(1.0, 1 + math.prod(self.sizes))[:, None]
        return streams.unflatten(2, self.sizes)


def test_every_stream_of_a_token_is_handed_from_block_to_block():
    model, ids_BT = with_streams(3), torch.randint(10, (5, 6), generator=torch.Generator().manual_seed(2))
    assert torch.equal(torch.cat(walk(model, ids_BT)), model(ids_BT).logits)


def test_streams_that_stand_before_the_windows_of_a_batch_are_refused():
    """As in Gemma 3n."""
    model = Model(False, lambda block, hidden: block(hidden))
    model.embedding = nn.Sequential(model.embedding, nn.Unflatten(0, (1, -1)), Repeated(2))
    with pytest.raises(ModelError, match=r"hidden states of Model have shape \[2, 1, 3, 4\], not \(batch, tokens"):
        walk(model, torch.ones(1, 3, dtype=torch.long))


class Repeated(nn.Module):
    def __init__(self, times: int):
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(self.times, *(1,) * (x.ndim - 1))


def test_hidden_states_of_five_dimensions_are_refused():
    with pytest.raises(ModelError, match=r"hidden states of Model have shape \[1, 3, 2, 2, 4\], not \(batch, tokens"):
        walk(with_streams(2, 2), torch.ones(1, 3, dtype=torch.long))


class TestWhatBlocksReturn:
    """Blocks that return the ids of the tokens seen so far beside hidden states, and take those of the block before."""

    @pytest.fixture
    def windows_WT(self) -> Tensor:
        return torch.randint(10, (5, 4), generator=torch.Generator().manual_seed(2))

    def model(self, takes: Callable[[list[Any]], Any]) -> Model:
        """takes: of what all blocks so far have returned, what the next one is called with."""
        torch.manual_seed(0)
        model = Model(True, lambda block, hidden: self.step(takes, block, hidden))
        for block in model.blocks:
            block.forward = partial(self.forward, block)
        model.register_forward_pre_hook(lambda module, args: self.returned.clear())
        return model

    def step(self, takes: Callable[[list[Any]], Any], block: nn.Module, hidden_BTD: Tensor) -> Tensor:
        hidden_BTD, returned = block(hidden_BTD, chosen=takes(self.returned))
        self.returned.append(returned)
        return hidden_BTD

    def setup_method(self) -> None:
        self.returned: list[Any] = []

    @staticmethod
    def forward(block: nn.Module, hidden_BTD: Tensor, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
        if chosen is None:
            chosen = hidden_BTD.argmax(-1)
        return hidden_BTD + block.linear(hidden_BTD) + chosen[..., None], chosen + 1

    @torch.no_grad()
    @pytest.mark.parametrize("batch_size", [1, 2, 5])
    def test_it_reaches_the_next_block_with_its_own_batch(self, windows_WT, batch_size):
        model = self.model(lambda returned: returned[-1] if returned else None)
        walked = [output[0] for output in walk(model, windows_WT, batch_size)]
        assert torch.equal(torch.cat(walked), torch.cat([model(ids).logits for ids in windows_WT.split(batch_size)]))

    def test_the_call_for_any_windows_is_without_it(self, windows_WT):
        opened = resident(self.model(lambda returned: returned[-1] if returned else None))
        run = next(walk_blocks(opened, windows_WT, 2))
        run.forward()
        assert all(len(left) == 1 for left in run.hidden.left.values())
        assert run.hidden.call_of_one(1).kwargs == {"chosen": None}

    def test_what_no_block_is_called_with_is_not_kept(self, windows_WT):
        run = next(walk_blocks(resident(self.model(lambda returned: None)), windows_WT, 2))
        run.forward()
        assert not any(run.hidden.left.values())
        assert run.hidden.call_of_one(1).kwargs == {"chosen": None}

    def test_a_model_that_gives_it_to_another_block_than_the_next_is_refused(self, windows_WT):
        model = self.model(lambda returned: returned[0] if returned else None)
        with pytest.raises(ModelError, match="Model calls decoder block 2 with what block 0 returns"):
            walk(model, windows_WT)


def test_a_model_that_computes_with_what_blocks_return_where_they_return_anything_is_walked():
    model = Model(True, lambda block, hidden: added(*block(hidden)))
    ids_BT = torch.randint(10, (2, 5))
    assert torch.equal(walk(model, ids_BT)[0][0], model(ids_BT).logits)


def added(hidden: Tensor, other: Tensor | None) -> Tensor:
    return hidden if other is None else hidden + other.mean()


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
