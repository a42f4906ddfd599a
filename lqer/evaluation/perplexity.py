"""Perplexity under three protocols, which papers rarely distinguish and whose values are not comparable.

    concat       GPTQ's: one string joiner.join(rows), one tokenizer call, windows of seq_len without overlap, the tail
                 dropped; exp of the mean over all predicted tokens. The number that papers print for WikiText-2.
    row-batches  LQER's: the rows are tokenized in batches of 1000, and the mean is taken over batches of windows. For
                 comparison with LQER's tables.
    lm-eval      word perplexity of whole documents by lm-evaluation-harness: rolling windows in which every token is
                 predicted, divided by the number of words. A BOS that the tokenizer adds is predicted too, at some ten
                 nats per document, which matters for short documents.

The first two are pure functions from text to token windows and from windows to a result, with one loss loop for both.
They take a transformers model, or an OpenedModel, which is evaluated block by block.

Shapes: W windows, B windows of one batch, T tokens of a window, V vocabulary, R positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from lqer.errors import ConfigError, DataError
from lqer.evaluation import harness
from lqer.evaluation.logits import LOSS_POSITIONS, window_logits
from lqer.evaluation.progress import progress_bar
from lqer.models.loaders import OpenedModel

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# LQER maps the tokenizer over its dataset with datasets' default batch of 1000 rows.
LQER_BATCH_ROWS = 1000
LQER_JOINER = "\n\n"


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity, and what it was taken over."""

    perplexity: float  # exp(nll); inf or nan if the model's losses are
    tokens: int  # predicted tokens
    windows: int
    seq_len: int
    protocol: str
    nll: float  # mean negative log-likelihood in nats, per token or, under lm-eval, per word


def concat_windows(tokenizer: PreTrainedTokenizerBase, rows: Iterable[str], joiner: str, seq_len: int) -> Tensor:
    """windows_WT int64 of the rows as one text; special tokens as the tokenizer adds them, once.

    Raises DataError if the text is shorter than one window.
    """
    return _cut(_tokenize(tokenizer, joiner.join(rows)), seq_len)


def row_batch_windows(tokenizer: PreTrainedTokenizerBase, rows: Iterable[str], joiner: str, seq_len: int) -> Tensor:
    """windows_WT int64 as LQER's code makes them: special tokens once per 1000 rows.

    The rows are joined by blank lines in parts of 1000, each part is tokenized by itself, and the tokens of all parts
    are cut together. `joiner` is ignored: LQER's code always uses a blank line.

    Raises DataError if the text is shorter than one window.
    """
    rows = list(rows)
    parts = (rows[start : start + LQER_BATCH_ROWS] for start in range(0, len(rows), LQER_BATCH_ROWS))
    return _cut([token for part in parts for token in _tokenize(tokenizer, LQER_JOINER.join(part))], seq_len)


def concat_perplexity(
    model: PreTrainedModel | OpenedModel, windows_WT: Tensor, batch_size: int, progress: bool = True
) -> PerplexityResult:
    """The exponential of the mean over all predicted tokens, independent of `batch_size` up to rounding."""
    return concat_result(window_nlls(model, windows_WT.split(batch_size), progress), windows_WT)


def concat_result(nlls: Sequence[Tensor], windows_WT: Tensor) -> PerplexityResult:
    """The same from the losses of all batches, as `window_nlls` gives them."""
    return _result("concat", torch.cat([*nlls]).mean(), windows_WT)


def row_batch_result(nlls: Sequence[Tensor], windows_WT: Tensor) -> PerplexityResult:
    """The exponential of the mean over batches of each batch's mean, from losses as `window_nlls` gives them.

    A smaller last batch has the weight of a full one, so the result depends on the batch size unless that divides the
    number of windows.
    """
    return _result("row-batches", torch.stack([nll_B.mean() for nll_B in nlls]).mean(), windows_WT)


def lm_eval_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: list[str], seq_len: int, batch_size: int
) -> PerplexityResult:
    """Word perplexity of `documents` by lm-evaluation-harness, in windows of `seq_len` tokens.

    Empty documents are left out: the library would count one word in them. Raises DataError if none is left.
    """
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise DataError("perplexity by lm-eval needs at least one document with text; found none")
    return _lm_eval_result(harness.score_documents(model, tokenizer, documents, seq_len, batch_size), seq_len)


class WindowedProtocol(NamedTuple):
    """windows: (tokenizer, rows, joiner, seq_len) -> token ids (W, T). result: (losses, windows) -> the perplexity."""

    windows: Callable[[PreTrainedTokenizerBase, Iterable[str], str, int], Tensor]
    result: Callable[[Sequence[Tensor], Tensor], PerplexityResult]


# Without lm-eval, which takes documents, not windows.
WINDOWED_PROTOCOLS = {
    "concat": WindowedProtocol(concat_windows, concat_result),
    "row-batches": WindowedProtocol(row_batch_windows, row_batch_result),
}


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: no warning about a text beyond the model's context, which is cut into windows.
    return tokenizer(text, verbose=False)["input_ids"]


def _cut(tokens: list[int], seq_len: int) -> Tensor:
    """windows_WT int64: the tokens cut into windows of seq_len, the tail dropped."""
    if seq_len < 2:
        raise ConfigError(
            f"evaluation.perplexity.seq_len must be at least 2, so that a window predicts a token: found {seq_len}"
        )
    n_windows = len(tokens) // seq_len
    if not n_windows:
        raise DataError(
            f"perplexity needs a text of at least one window, seq_len = {seq_len} tokens: found {len(tokens)}"
        )
    return torch.tensor(tokens[: n_windows * seq_len], dtype=torch.int64).view(n_windows, seq_len)


@torch.inference_mode()
def window_nlls(model: PreTrainedModel | OpenedModel, windows: Sequence[Tensor], progress: bool = True) -> list[Tensor]:
    """For each batch of windows (B, T), nll_B float64 on the CPU: in nats, the mean of a window's T - 1 predictions.

    A batch's losses do not depend on the other batches. Sets the model to eval mode. The progress bar synchronizes with
    the device once per batch to print the running perplexity; without it nothing waits until the end.
    """
    logits_of = window_logits(model, windows, "perplexity", progress)
    batches = []
    running_nll = torch.zeros((), dtype=torch.float64)
    with progress_bar(progress)(total=sum(map(len, windows)), desc="perplexity", unit="window") as bar:
        for batch, windows_BT in enumerate(windows):
            # In one expression, so that a batch's logits are freed before the next batch.
            nll_B = batch_nlls(logits_of(batch), windows_BT)
            batches.append(nll_B)
            if not bar.disable:
                running_nll += nll_B.sum().cpu()
                bar.update(len(nll_B))
                bar.set_postfix(ppl=f"{(running_nll / bar.n).exp().item():.4f}")
    return [nll_B.cpu() for nll_B in batches]


def batch_nlls(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """nll_B of `window_nlls` of one batch, from its logits and on their device."""
    return torch.stack([_mean_nll(logits_TV, tokens_T) for logits_TV, tokens_T in zip(logits_BTV, tokens_BT)])


def _mean_nll(logits_TV: Tensor, tokens_T: Tensor) -> Tensor:
    """The mean over tokens 1 .. T-1 of -log p(token | tokens before it), a float64 scalar; losses in float32."""
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
