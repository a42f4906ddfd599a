"""How far a model's next-token distribution is from the original's, on the windows of a perplexity.

For the original's distribution p and the candidate's q after the same tokens,

    KL(p || q) = sum over tokens v of p_v (log p_v - log q_v)                                                    [nats]

A vocabulary of 152k times 300k tokens cannot be stored, so of the original only the K most likely tokens are, with
their logits, and the log-sum-exp of all others, which count as one token ("the rest"). By the data-processing
inequality (merging tokens cannot raise a divergence) the result is a **lower bound** of KL(p || q), exact where K is
the whole vocabulary. `covered` is the mean probability of the K tokens under p: what the bound resolves.

Perplexity of one text can fall while the model moves away from the original; this cannot.

Shapes: N positions (all but the last of each window), R positions of a chunk, K most likely tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from lqer.evaluation.logits import LOSS_POSITIONS, window_logits
from lqer.evaluation.progress import progress_bar
from lqer.models.loaders import OpenedModel

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PERCENTILE = 99


class Distribution(NamedTuple):
    """The original's next-token distribution at N positions.

    ids_NK: int32, most likely first. logits_NK: in the model's dtype. total_N, rest_N: float32, log-sum-exp of all
    logits and of those that are not in ids_NK (-inf if there are none).
    """

    ids_NK: Tensor
    logits_NK: Tensor
    total_N: Tensor
    rest_N: Tensor


@dataclass(frozen=True)
class DivergenceResult:
    """nan or inf where the candidate's logits are."""

    kl_mean: float  # nats per token
    kl_p99: float  # 99 of 100 tokens have less
    top1_agreement: float  # share of tokens
    covered: float  # mean probability, under the original, of the tokens that are told apart
    top_k: int
    tokens: int
    windows: int
    seq_len: int
    protocol: str


def distribution(logits_NV: Tensor, top_k: int) -> Distribution:
    """The K = min(top_k, V) most likely tokens of each position, and the rest."""
    parts = []
    for logits_RV in logits_NV.split(LOSS_POSITIONS):
        wide_RV = logits_RV.float()
        top = wide_RV.topk(min(top_k, wide_RV.shape[-1]), dim=-1)
        parts.append((top.indices.int(), top.values.to(logits_NV.dtype), *_log_sums(wide_RV, top.indices)))
    return Distribution(*(torch.cat(part) for part in zip(*parts)))


def divergences(original: Distribution, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """(kl_N float64, agrees_N bool) of a candidate's logits at the same positions, on their device.

    agrees: the original's most likely token is the candidate's, or ties with it.
    """
    kl, agrees = [], []
    split = [field.split(LOSS_POSITIONS) for field in (logits_NV, *original)]
    for logits_RV, *parts in zip(*split, strict=True):
        wide_RV = logits_RV.float()
        ids_RK, logits_RK, total_R, rest_R = (part.to(wide_RV.device) for part in parts)
        ids_RK = ids_RK.long()
        own_RK = wide_RV.gather(-1, ids_RK)
        own_total_R, own_rest_R = _log_sums(wide_RV, ids_RK)
        log_p = torch.cat([logits_RK.double(), rest_R.double()[:, None]], dim=-1) - total_R.double()[:, None]
        log_q = torch.cat([own_RK.double(), own_rest_R.double()[:, None]], dim=-1) - own_total_R.double()[:, None]
        # p log(p / q) is 0 where p is 0, whatever q is.
        terms = torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q))
        kl.append(terms.sum(-1))
        agrees.append(own_RK[:, 0] >= wide_RV.amax(-1))
    return torch.cat(kl), torch.cat(agrees)


def _log_sums(logits_RV: Tensor, ids_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of all logits, and of those that are not among `ids_RK`; one minus the others' sum would cancel."""
    others_RV = logits_RV.scatter(-1, ids_RK, -math.inf)
    return logits_RV.logsumexp(-1), others_RV.logsumexp(-1)


def covered_probability(original: Distribution) -> Tensor:
    """The probability of the K tokens at each position, float64 (N,)."""
    return -torch.expm1(original.rest_N.double() - original.total_N.double())


# Gets the number of a batch and its logits (B, T, V), of which something else is made in the same pass.
Seen = Callable[[int, "Tensor"], None]


def _unseen(batch: int, logits_BTV: Tensor) -> None:
    """Nothing else."""


@torch.inference_mode()
def original_distributions(
    model: PreTrainedModel | OpenedModel,
    batches: Sequence[Tensor],
    top_k: int,
    seen: Seen = _unseen,
    progress: bool = True,
) -> Iterator[Distribution]:
    """The original's distributions for each batch of token windows (B, T), N = B (T - 1) positions, on the CPU."""
    logits_of = window_logits(model, batches, "distribution", progress)

    def of_batch(batch: int) -> list[Distribution]:
        """A function, so that a batch's logits are freed before the next batch."""
        logits_BTV = logits_of(batch)
        seen(batch, logits_BTV)
        return [distribution(logits_TV[:-1], top_k) for logits_TV in logits_BTV]

    with progress_bar(progress)(total=sum(map(len, batches)), desc="distribution", unit="window") as bar:
        for batch, windows_BT in enumerate(batches):
            found = of_batch(batch)
            bar.update(len(windows_BT))
            yield Distribution(*(torch.cat(parts).cpu() for parts in zip(*found)))


@torch.inference_mode()
def divergence(
    model: PreTrainedModel | OpenedModel,
    originals: Iterable[Distribution],
    batches: Sequence[Tensor],
    protocol: str,
    seen: Seen = _unseen,
    progress: bool = True,
) -> DivergenceResult:
    """The divergence of a candidate from the original over all batches of token windows (B, T).

    originals: `original_distributions` of the same batches. The mean is over all positions, under every protocol.
    """
    logits_of = window_logits(model, batches, "divergence", progress)
    kl, agrees, covered, top_k = [], [], [], 0

    def of_batch(batch: int, of_windows: Iterable[Sequence[Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """A function, so that a batch's logits are freed before the next batch."""
        logits_BTV = logits_of(batch)
        seen(batch, logits_BTV)
        return [
            divergences(Distribution(*parts), logits_TV[:-1])
            for parts, logits_TV in zip(of_windows, logits_BTV, strict=True)
        ]

    with progress_bar(progress)(total=sum(map(len, batches)), desc="divergence", unit="window") as bar:
        for batch, (windows_BT, original) in enumerate(zip(batches, originals, strict=True)):
            of_windows = zip(*(field.split(windows_BT.shape[1] - 1) for field in original))
            found = of_batch(batch, of_windows)
            kl += [kl_N.cpu() for kl_N, _ in found]
            agrees += [agrees_N.cpu() for _, agrees_N in found]
            covered.append(covered_probability(original))
            top_k = original.ids_NK.shape[1]
            bar.update(len(windows_BT))
    kl_N = torch.cat(kl)
    return DivergenceResult(
        kl_mean=kl_N.mean().item(),
        # One of the values: between an infinite one and its neighbour nothing can be interpolated.
        kl_p99=float(np.percentile(kl_N.numpy(), PERCENTILE, method="higher")),
        top1_agreement=torch.cat(agrees).double().mean().item(),
        covered=torch.cat(covered).mean().item(),
        top_k=top_k,
        tokens=len(kl_N),
        windows=sum(map(len, batches)),
        seq_len=batches[0].shape[1],
        protocol=protocol,
    )
