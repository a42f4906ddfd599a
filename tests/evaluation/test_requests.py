"""Units of requests: the scores of one call of the library, whoever scores which unit."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from helpers import byte_tokenizer, tiny_llama

from lqer.evaluation import requests
from lqer.evaluation.adapter import adapter_of
from lqer.evaluation.requests import Scores, Share, request_units
from lqer.models.source import ModelSource
from lqer.models.streaming import open_model
from lqer.store.offload import Offload

BATCH = 3


@pytest.fixture(scope="module")
def adapter():
    return adapter_of(tiny_llama(), byte_tokenizer(), BATCH, 64, Scores())


def asked(count: int = 40) -> list[requests.Request]:
    """Contexts of many lengths, each with two answers of one token, and every third with one of several."""
    draw = random.Random(0)
    found: list[requests.Request] = []
    for number in range(count):
        context = [draw.randrange(20, 120) for _ in range(draw.randrange(2, 30))]
        answers = [[65], [66]] + ([[65, 66, 67]] if number % 3 == 0 else [])
        found += [((str(number), str(answer)), context, answer) for answer in answers]
    return found


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(requests, "BATCHES_OF_A_UNIT", 2)


def test_every_request_is_in_one_unit_and_the_longest_come_first():
    all_asked = asked()
    units = request_units(all_asked, BATCH)
    assert sorted(place for unit in units for place in unit) == list(range(len(all_asked)))
    longest = [max(len(all_asked[place][1]) + len(all_asked[place][2]) for place in unit) for unit in units]
    assert longest == sorted(longest, reverse=True)
    assert len(units) > 3


def test_requests_of_one_context_are_scored_together():
    all_asked = asked()
    unit_of = {place: number for number, unit in enumerate(request_units(all_asked, BATCH)) for place in unit}
    for place in range(len(all_asked) - 1):
        (_, context, answer), (_, next_context, next_answer) = all_asked[place : place + 2]
        if context == next_context and len(answer) == len(next_answer) == 1:
            assert unit_of[place] == unit_of[place + 1]


def test_scores_of_units_are_those_of_one_call_of_the_library(adapter):
    all_asked = asked()
    whole = type(adapter).__mro__[1]._loglikelihood_tokens(adapter, all_asked, disable_tqdm=True)
    assert adapter._loglikelihood_tokens(all_asked, disable_tqdm=True) == whole


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}], ids=["own head", "tied head"])
def test_scores_block_by_block_are_those_of_the_whole_model(tmp_path, settings):
    """Whatever the lengths of the batches, every block is read once."""
    model, all_asked = tiny_llama(**settings), asked()
    model.save_pretrained(tmp_path)
    device = torch.device("cpu")
    opened = open_model(ModelSource("model", str(tmp_path), None, "", ""), torch.float32, device, Offload())
    read = []
    loader = replace(opened.loader, read=lambda index: read.append(index) or opened.loader.read(index))
    found = [
        adapter_of(one, byte_tokenizer(), BATCH, 64, scores)._loglikelihood_tokens(all_asked, True)
        for one, scores in ((model, Scores()), (replace(opened, loader=loader), Scores()))
    ]
    assert found[0] == found[1]
    assert read == [0, 1]


def test_shares_of_several_processes_give_the_scores_of_one():
    model, all_asked = tiny_llama(), asked()

    def scored(scores: Scores):
        return adapter_of(model, byte_tokenizer(), BATCH, 64, scores)._loglikelihood_tokens(all_asked, True)

    alone = scored(Scores())
    found = {}
    for index in range(3):
        part = Scores(Share(index, 3))
        scored(part)
        assert 0 < len(part.found) < len(request_units(all_asked, BATCH))
        found |= part.tensors()
    joined = Scores.of(found)
    assert scored(joined) == alone
    assert len(joined.found) == len(request_units(all_asked, BATCH))
