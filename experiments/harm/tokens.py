"""Which tokens own the second moments of a linear's inputs, and second moments with some of them weighted down.

    share of tokens S in H = Σ_t w_t x_t x_tᵀ:    Σ_{t in S} w_t ‖x_t‖² / tr H

A token is massive at a site if its squared norm is above 100 medians of the batch.

Shapes: B windows of a batch, T tokens of a window, N tokens of a batch, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from harm.subject import Subject
from lqer.models.walker import walk_blocks
from lqer.stages.observe import OriginalBlock
from lqer.statistics import Accumulator, Gang, Hessian, Statistic
from lqer.statistics.base import Allocator

MASSIVE = 100.0  # medians of the squared norms
CAP = 4.0


def is_massive(squares_BT: Tensor) -> Tensor:
    return squares_BT > MASSIVE * squares_BT.median()


def _first_as(share: float, squares_BT: Tensor) -> Tensor:
    """The first tokens of the windows together have this share of all weights."""
    weights_BT = torch.ones_like(squares_BT)
    weights_BT[:, 0] = share / (1 - share) * (squares_BT.shape[1] - 1)
    return weights_BT


def _massive_left_out(squares_BT: Tensor) -> Tensor:
    return (~is_massive(squares_BT)).to(squares_BT.dtype)


def _capped(squares_BT: Tensor) -> Tensor:
    return (CAP * squares_BT.median() / squares_BT).clamp(max=1)


# What a token counts, given the squared norms of a batch's tokens (B, T).
RULES: dict[str, Callable[[Tensor], Tensor]] = {
    **{f"first tokens as {share:.0%}": partial(_first_as, share) for share in (0.0, 0.01, 0.1, 0.5)},
    "massive tokens left out": _massive_left_out,
    f"tokens capped at {CAP:g} medians": _capped,
}


@dataclass(frozen=True)
class HessianOfTokens(Statistic):
    """E[x xᵀ] with tokens weighted by one of `RULES`, in windows of `seq_len` tokens."""

    kind = "hessian-of-tokens"

    rule: str
    seq_len: int

    def accumulator(self, in_features: int, device: torch.device, offload: Allocator) -> Accumulator:
        return _OfTokens(Hessian().accumulator(in_features, device, offload), self)

    def nbytes(self, in_features: int) -> int:
        return Hessian().nbytes(in_features)


@dataclass
class _OfTokens:
    of_all: Accumulator
    settings: HessianOfTokens

    def add(self, x_NI: Tensor, original_NI: Tensor | None, sampled_N: Tensor, weights_N: Tensor | None = None) -> None:
        assert weights_N is None, "tokens have weights of their own here"
        squares_BT = x_NI.float().square().sum(-1).unflatten(0, (-1, self.settings.seq_len))
        self.of_all.add(x_NI, original_NI, sampled_N, RULES[self.settings.rule](squares_BT).flatten())

    def join(self, gang: Gang) -> None:
        self.of_all.join(gang)

    def result(self) -> Tensor:
        return self.of_all.result()


@dataclass(frozen=True)
class Shares:
    """Of one input: shares of tr H of the first tokens of the windows and of massive tokens, under equal weights and
    those of the residual stream (None where tokens have none), and massive tokens per window.
    """

    first: float
    massive: float
    weighted_first: float | None
    weighted_massive: float | None
    massive_per_window: float


def token_shares(subject: Subject) -> dict[str, Shares]:
    """By the first linear of every input site of the original model."""
    text = replace(subject.text, token_weights="residual")
    found: dict[str, Shares] = {}
    for run in walk_blocks(subject.opened, text.windows_WT, text.batch_size):
        original = OriginalBlock(run, paired=True, by_stream=True, weights={})
        sums: dict[str, list[Tensor]] = {}
        for batch in range(len(run.hidden.batches)):
            seen = original.batch(batch)
            assert seen.inputs is not None
            sites: dict[int, str] = {}
            for name, x in seen.inputs.items():
                sites.setdefault(id(x), name)
            for name in sites.values():
                squares_BT = seen.inputs[name].float().square().sum(-1).double()
                weights_N = seen.weights.get(name)
                sums.setdefault(name, []).append(_sums(squares_BT, weights_N))
        for name, parts in sums.items():
            total, first, massive, count, *weighted = torch.stack(parts).sum(0).tolist()
            found[f"{run.name}.{name}"] = Shares(
                first=first / total,
                massive=massive / total,
                weighted_first=weighted[1] / weighted[0] if weighted else None,
                weighted_massive=weighted[2] / weighted[0] if weighted else None,
                massive_per_window=count / len(text.windows_WT),
            )
        run.forward()
    return found


def _sums(squares_BT: Tensor, weights_N: Tensor | None) -> Tensor:
    """Of all tokens, the first and the massive ones; the number of these; the same sums under the weights."""
    massive_BT = is_massive(squares_BT)

    def of(values_BT: Tensor) -> list[Tensor]:
        return [values_BT.sum(), values_BT[:, 0].sum(), values_BT[massive_BT].sum()]

    weighted = [] if weights_N is None else of(squares_BT * weights_N.view_as(squares_BT))
    return torch.stack([*of(squares_BT), massive_BT.sum().double(), *weighted])
