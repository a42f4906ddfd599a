"""Perplexity under three protocols that papers rarely tell apart, and whose numbers cannot be compared.

    gptq     one string joiner.join(rows), one tokenizer call, windows of seq_len without overlap, the tail dropped;
             exp of the mean over all predicted tokens. The number that papers print for WikiText-2.
    lqer     as LQER's code does it: the rows are tokenized in parts, every shard of them loses its own tail, and the
             mean is taken over batches. For comparing with LQER's tables.
    lm-eval  word perplexity of whole documents by lm-evaluation-harness: rolling windows in which every token is
             predicted, divided by the number of words. A BOS that the tokenizer adds is predicted too, and dearly, once
             per document: on short documents it dominates.

The first two are pure functions from text to token windows and from windows to a result; one loss loop serves both.

Shapes: W windows, B windows of one batch, T tokens of a window, V vocabulary, R positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from lqer.errors import ConfigError, DataError
from lqer.evaluation import harness

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Logits are widened to fp32 this many positions at a time: 128 MiB for a vocabulary of 128k, beside logits in the
# model's dtype that take 512 MiB per window of 2048.
LOSS_POSITIONS = 256

# LQER maps the tokenizer over its dataset with datasets' default batch of 1000 rows, in 8 processes.
LQER_BATCH_ROWS = 1000
LQER_SHARDS = 8
LQER_JOINER = "\n\n"


@dataclass(frozen=True)
class PerplexityResult:
    perplexity: float  # exp(nll); inf or nan where the model's losses are
    tokens: int  # predicted tokens
    windows: int
    seq_len: int
    protocol: str
    nll: float  # mean negative log-likelihood in nats, per token or, under lm-eval, per word


def gptq_windows(tokenizer: PreTrainedTokenizerBase, rows: Iterable[str], joiner: str, seq_len: int) -> Tensor:
    """windows_WT int64 of the rows as one text; special tokens as the tokenizer adds them, once.

    Raises DataError when the text is shorter than one window.
    """
    return _cut([_tokenize(tokenizer, joiner.join(rows))], seq_len)


def lqer_windows(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[str], joiner: str, seq_len: int, shards: int = LQER_SHARDS
) -> Tensor:
    """windows_WT int64 as LQER's code makes them: special tokens per part, one tail dropped per shard.

    The rows fall into `shards` contiguous shards, as `datasets` deals them to processes, and each shard into parts of
    1000 rows. A part is joined by blank lines and tokenized; the tokens of a shard are cut together. `joiner` is taken
    for the sake of a common signature: LQER's code knows only the blank line.

    Raises DataError when no shard is as long as one window.
    """
    rows = list(rows)
    shard_rows, longer_shards = divmod(len(rows), shards)
    token_lists = []
    start = 0
    for shard in range(min(shards, len(rows))):
        stop = start + shard_rows + (shard < longer_shards)
        parts = (rows[part : min(part + LQER_BATCH_ROWS, stop)] for part in range(start, stop, LQER_BATCH_ROWS))
        token_lists.append([token for part in parts for token in _tokenize(tokenizer, LQER_JOINER.join(part))])
        start = stop
    return _cut(token_lists, seq_len)


def gptq_perplexity(
    model: PreTrainedModel, windows_WT: Tensor, batch_size: int, progress: bool = True
) -> PerplexityResult:
    """The exponential of the mean over all predicted tokens; `batch_size` changes it by rounding at most."""
    nll_W = _window_nlls(model, windows_WT, batch_size, progress)
    return _result("gptq", nll_W.mean(), windows_WT)


def lqer_perplexity(
    model: PreTrainedModel, windows_WT: Tensor, batch_size: int, progress: bool = True
) -> PerplexityResult:
    """The exponential of the mean over batches of each batch's mean.

    A last batch with fewer windows weighs as much as a full one, so the result depends on `batch_size` unless that
    divides the number of windows.
    """
    nll_W = _window_nlls(model, windows_WT, batch_size, progress)
    return _result("lqer", torch.stack([nll_B.mean() for nll_B in nll_W.split(batch_size)]).mean(), windows_WT)


def lm_eval_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: list[str], seq_len: int, batch_size: int
) -> PerplexityResult:
    """Word perplexity of `documents` by lm-evaluation-harness, in windows of `seq_len` tokens.

    Documents without text are left out: the library would count a word in them. Raises DataError when none is left.
    """
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise DataError("perplexity by lm-eval needs at least one document with text: there is none")
    return _lm_eval_result(harness.score_documents(model, tokenizer, documents, seq_len, batch_size), seq_len)


def lm_eval_stock_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, seq_len: int, batch_size: int
) -> PerplexityResult:
    """Word perplexity of a task that the library brings, such as `wikitext`; its data comes from the hub."""
    return _lm_eval_result(harness.score_stock_task(model, tokenizer, task, seq_len, batch_size), seq_len)


class WindowedProtocol(NamedTuple):
    windows: Callable[[PreTrainedTokenizerBase, Iterable[str], str, int], Tensor]
    perplexity: Callable[[PreTrainedModel, Tensor, int, bool], PerplexityResult]


# lm-eval is not among them: it takes documents, not windows.
WINDOWED_PROTOCOLS = {
    "gptq": WindowedProtocol(gptq_windows, gptq_perplexity),
    "lqer": WindowedProtocol(lqer_windows, lqer_perplexity),
}


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: a whole corpus is longer than the model's context by design, and is cut before the model sees it.
    return tokenizer(text, verbose=False)["input_ids"]


def _cut(token_lists: list[list[int]], seq_len: int) -> Tensor:
    """windows_WT int64: every list cut into windows of seq_len, its tail dropped."""
    if seq_len < 2:
        raise ConfigError(f"seq_len must be at least 2, so that a window predicts a token: found {seq_len}")
    windows = [
        tokens[start : start + seq_len]
        for tokens in token_lists
        for start in range(0, len(tokens) - seq_len + 1, seq_len)
    ]
    if not windows:
        longest = max(map(len, token_lists), default=0)
        raise DataError(f"perplexity needs a text of at least one window, seq_len = {seq_len} tokens: found {longest}")
    return torch.tensor(windows, dtype=torch.int64)


@torch.inference_mode()
def _window_nlls(model: PreTrainedModel, windows_WT: Tensor, batch_size: int, progress: bool) -> Tensor:
    """nll_W float64 on the CPU: the mean negative log-likelihood in nats of each window's T - 1 predicted tokens.

    Puts the model into eval mode. The progress bar, when shown, waits for the device once per batch to print the
    running perplexity; without it nothing waits until the end.
    """
    model.eval()
    batches = []
    running_nll = torch.zeros((), dtype=torch.float64)
    with tqdm(total=len(windows_WT), desc="perplexity", unit="window", disable=not progress) as bar:
        for windows_BT in windows_WT.split(batch_size):
            tokens_BT = windows_BT.to(model.device)
            logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
            nll_B = torch.stack([_mean_nll(logits_TV, tokens_T) for logits_TV, tokens_T in zip(logits_BTV, tokens_BT)])
            batches.append(nll_B)
            if progress:
                running_nll += nll_B.sum().cpu()
                bar.update(len(nll_B))
                bar.set_postfix(ppl=f"{(running_nll / bar.n).exp().item():.4f}")
    return torch.cat(batches).cpu()


def _mean_nll(logits_TV: Tensor, tokens_T: Tensor) -> Tensor:
    """The mean over tokens 1 .. T-1 of -log p(token | tokens before it), a float64 scalar; losses are taken in fp32."""
    targets_T = tokens_T[1:].to(logits_TV.device)
    nll_T = torch.cat(
        [
            F.cross_entropy(logits_RV.float(), targets_R, reduction="none")
            for logits_RV, targets_R in zip(logits_TV[:-1].split(LOSS_POSITIONS), targets_T.split(LOSS_POSITIONS))
        ]
    )
    return nll_T.double().mean()


def _result(protocol: str, nll: Tensor, windows_WT: Tensor) -> PerplexityResult:
    n_windows, seq_len = windows_WT.shape
    return PerplexityResult(
        # A tensor's exp overflows to inf where math.exp raises.
        perplexity=nll.exp().item(),
        tokens=n_windows * (seq_len - 1),
        windows=n_windows,
        seq_len=seq_len,
        protocol=protocol,
        nll=nll.item(),
    )


def _lm_eval_result(score: harness.RollingScore, seq_len: int) -> PerplexityResult:
    nll = torch.tensor(-score.log_likelihood / score.words, dtype=torch.float64)
    return PerplexityResult(nll.exp().item(), score.tokens, score.windows, seq_len, "lm-eval", nll.item())
