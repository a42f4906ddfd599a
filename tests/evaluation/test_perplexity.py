"""The three perplexity protocols against computations written out here, on a tiny model and a byte tokenizer."""

from __future__ import annotations

import copy
import logging
import math
import re
from pathlib import Path

import datasets
import pytest
import torch
from helpers import BOS, byte_tokenizer, tiny_llama
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from lqer.errors import ConfigError, DataError
from lqer.evaluation import perplexity
from lqer.evaluation.perplexity import (
    WINDOWED_PROTOCOLS,
    concat_perplexity,
    concat_windows,
    lm_eval_perplexity,
    row_batch_result,
    row_batch_windows,
    window_nlls,
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(max_position_embeddings=64)


@pytest.fixture(scope="module")
def windows_WT() -> torch.Tensor:
    return torch.randint(257, (7, 16), generator=torch.Generator().manual_seed(0))


def log_probabilities(model: LlamaForCausalLM, tokens: list[int]) -> list[float]:
    """Of tokens[1:], each given all before it."""
    with torch.no_grad():
        log_p_TV = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), dim=-1)
    return [log_p_TV[position, token].item() for position, token in enumerate(tokens[1:])]


def window_nll(model: LlamaForCausalLM, tokens: list[int]) -> float:
    return -sum(log_probabilities(model, tokens)) / (len(tokens) - 1)


def test_concat_perplexity_is_exp_of_the_mean_over_all_predicted_tokens(model, windows_WT):
    nlls = [window_nll(model, tokens) for tokens in windows_WT.tolist()]
    result = concat_perplexity(model, windows_WT, batch_size=2, progress=False)
    assert result.nll == pytest.approx(sum(nlls) / 7, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(sum(nlls) / 7), rel=1e-6)
    assert (result.protocol, result.windows, result.seq_len, result.tokens) == ("concat", 7, 16, 7 * 15)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_concat_perplexity_does_not_depend_on_the_batch_size(model, windows_WT, batch_size):
    expected = concat_perplexity(model, windows_WT, batch_size=3, progress=False)
    assert concat_perplexity(model, windows_WT, batch_size).perplexity == pytest.approx(expected.perplexity, rel=1e-6)


def test_the_loss_does_not_depend_on_how_many_positions_are_widened_at_once(model, windows_WT, monkeypatch):
    expected = concat_perplexity(model, windows_WT, batch_size=3, progress=False)
    monkeypatch.setattr(perplexity, "LOSS_POSITIONS", 4)
    assert concat_perplexity(model, windows_WT, 3, progress=False).nll == pytest.approx(expected.nll, rel=1e-12)


@pytest.mark.parametrize(("factor", "perplexity"), [(1e4, math.inf), (math.nan, math.nan)])
def test_a_loss_beyond_numbers_is_reported_as_it_is(model, windows_WT, factor, perplexity):
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data.mul_(factor)
    assert concat_perplexity(broken, windows_WT, batch_size=4).perplexity == pytest.approx(perplexity, nan_ok=True)


def test_concat_windows_hold_one_bos_and_the_joined_rows():
    windows_WT = concat_windows(byte_tokenizer(adds_bos=True), iter(["ab", "", "cd"]), "\n\n", seq_len=3)
    ids = byte_tokenizer(adds_bos=False)("ab\n\n\n\ncd")["input_ids"]
    assert windows_WT.tolist() == [[BOS, ids[0], ids[1]], ids[2:5], ids[5:8]]
    assert windows_WT.dtype == torch.int64


@pytest.mark.parametrize(("characters", "windows"), [(8, 2), (11, 2), (12, 3)])
def test_concat_windows_drop_the_tail_and_only_the_tail(characters, windows):
    assert concat_windows(byte_tokenizer(adds_bos=False), ["x" * characters], "\n", seq_len=4).shape == (windows, 4)


@pytest.mark.parametrize("name", WINDOWED_PROTOCOLS)
def test_a_text_shorter_than_a_window_is_refused_with_both_lengths(name):
    with pytest.raises(DataError, match="seq_len = 9 tokens: found 8"):
        WINDOWED_PROTOCOLS[name].windows(byte_tokenizer(adds_bos=False), ["x" * 8], "\n", 9)


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="found 0"):
        row_batch_windows(byte_tokenizer(adds_bos=False), [], "\n\n", seq_len=4)


def test_a_window_that_predicts_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"at least 2.*found 1"):
        concat_windows(byte_tokenizer(adds_bos=False), ["text"], "\n", seq_len=1)


def test_a_text_longer_than_the_models_context_is_tokenized_without_a_warning(caplog):
    logger = transformers_logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING):
            concat_windows(byte_tokenizer(adds_bos=True), ["x" * 100], "\n", seq_len=4)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize("n_rows", [20, 1000, 2500])
def test_row_batch_windows_are_those_of_rows_mapped_in_batches_of_1000(n_rows):
    rows = [f"row {index}" for index in range(n_rows)]
    tokenizer = byte_tokenizer(adds_bos=True)
    tokens = []
    for batch in datasets.Dataset.from_dict({"text": rows}).iter(batch_size=1000):
        tokens += tokenizer("\n\n".join(batch["text"]), verbose=False)["input_ids"]
    expected = [tokens[start : start + 4] for start in range(0, len(tokens) // 4 * 4, 4)]
    assert row_batch_windows(tokenizer, rows, "\n", seq_len=4).tolist() == expected


def test_row_batch_perplexity_counts_the_last_partial_batch_as_full(model, windows_WT):
    first, second, third = (window_nll(model, tokens) for tokens in windows_WT[:3].tolist())
    result = row_batch_result(window_nlls(model, windows_WT[:3].split(2), progress=False), windows_WT[:3])
    assert result.nll == pytest.approx(((first + second) / 2 + third) / 2, rel=1e-6)
    assert result.protocol == "row-batches"
    assert result.nll != pytest.approx(concat_perplexity(model, windows_WT[:3], 2, progress=False).nll, rel=1e-4)


def test_lm_eval_perplexity_predicts_every_token_and_divides_by_words(model):
    seq_len = 10
    documents = ["ab cd", "the quick  brown fox\njumps over", "[1, 2]", "x" * 20]
    tokenizer = byte_tokenizer(adds_bos=False)
    log_likelihood, n_tokens, n_windows = 0.0, 0, 0
    for document in documents:
        tokens = [BOS, *tokenizer(document, verbose=False)["input_ids"]]
        n_predicted = len(tokens) - 1
        n_tokens += n_predicted
        for start in range(0, n_predicted, seq_len):
            # A last window that is not full looks back, so that it too reads seq_len tokens.
            stop = min(start + seq_len, n_predicted)
            first = max(0, stop - seq_len)
            n_windows += 1
            log_likelihood += sum(log_probabilities(model, tokens[first : stop + 1])[start - first :])
    words = sum(len(re.split(r"\s+", document)) for document in documents)
    result = lm_eval_perplexity(model, tokenizer, documents, seq_len, batch_size=3)
    assert result.nll == pytest.approx(-log_likelihood / words, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(-log_likelihood / words), rel=1e-4)
    assert (result.protocol, result.tokens, result.windows, result.seq_len) == ("lm-eval", n_tokens, n_windows, 10)


def test_lm_eval_perplexity_leaves_out_documents_without_text(model):
    tokenizer = byte_tokenizer(adds_bos=False)
    with_blanks = lm_eval_perplexity(model, tokenizer, ["", "some words", " \n"], seq_len=8, batch_size=2)
    assert with_blanks == lm_eval_perplexity(model, tokenizer, ["some words"], seq_len=8, batch_size=2)
    with pytest.raises(DataError, match="at least one document with text"):
        lm_eval_perplexity(model, tokenizer, ["", "\n"], seq_len=8, batch_size=2)


def test_lm_eval_perplexity_leaves_tokenizer_and_model_as_they_were(model):
    tokenizer = byte_tokenizer(model_max_length=32)
    model.config.quantization_config = {"quant_method": "unknown to transformers"}
    try:
        lm_eval_perplexity(model, tokenizer, ["some words"], seq_len=8, batch_size=2)
        assert model.config.quantization_config == {"quant_method": "unknown to transformers"}
    finally:
        del model.config.quantization_config
    assert tokenizer.pad_token is None
    assert tokenizer.model_max_length == 32


def test_a_trained_model_has_its_known_perplexity(assets: Path):
    folder = assets / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    text = (assets / "text" / "tinystories" / "tinystories.txt").read_text()
    windows_WT = concat_windows(tokenizer, [text], "\n", seq_len=256)[:117]
    result = concat_perplexity(AutoModelForCausalLM.from_pretrained(folder), windows_WT, batch_size=4, progress=False)
    assert result.perplexity == pytest.approx(4.54, abs=0.005)
