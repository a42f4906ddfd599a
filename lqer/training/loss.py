"""Losses of fine-tuning, a few positions at a time: float32 copies of all logits would take more than both models.

Shapes: B windows, T tokens, V vocabulary, P positions of each window in a piece.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Positions whose losses are computed at once, of all windows of a batch together.
POSITIONS = 1024


def soft_loss(logits_BTV: Tensor, original_BTV: Tensor) -> Tensor:
    """Cross-entropy with the original's distribution, mean over all positions but the last.

    With the original's own logits it is the entropy of that distribution; the difference is the divergence KL.
    """
    return _mean(_soft_losses, logits_BTV[:, :-1], original_BTV[:, :-1])


def text_loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Cross-entropy with the next token."""
    return _mean(_text_losses, logits_BTV[:, :-1], ids_BT[:, 1:])


def _soft_losses(logits_BPV: Tensor, original_BPV: Tensor) -> Tensor:
    target_BPV = original_BPV.float().softmax(-1)
    return -(target_BPV * logits_BPV.float().log_softmax(-1)).sum(-1)


def _text_losses(logits_BPV: Tensor, ids_BP: Tensor) -> Tensor:
    return F.cross_entropy(logits_BPV.float().transpose(1, 2), ids_BP, reduction="none")


def _mean(losses: Callable[[Tensor, Tensor], Tensor], logits_BTV: Tensor, targets: Tensor) -> Tensor:
    """The mean of `losses` (B, P) over all pieces; a piece is computed once more for its gradient."""
    length = max(1, POSITIONS // len(logits_BTV))
    pieces = zip(logits_BTV.split(length, dim=1), targets.split(length, dim=1), strict=True)
    return torch.cat([checkpoint(losses, *piece, use_reentrant=False) for piece in pieces], dim=1).mean()
