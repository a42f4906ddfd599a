"""The logits of token windows, of a model in memory or one that is run block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from lqer.evaluation.progress import progress_bar
from lqer.models.loaders import OpenedModel
from lqer.models.walker import BlockRun, walk_to_logits

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Logits are converted to float32 this many positions at a time: 128 MiB for a vocabulary of 128k, in addition to the
# logits in the model's dtype, 512 MiB per window of 2048.
LOSS_POSITIONS = 256


def window_logits(
    model: PreTrainedModel | OpenedModel, batches: Sequence[Tensor], shown_as: str, progress: bool
) -> Callable[[int], Tensor]:
    """A function from a batch's index to its logits (B, T, V), on the model's device and in its dtype.

    batches: token windows (B, T). Sets the model to eval mode. An OpenedModel runs all batches through its blocks
    first, under a progress bar named `shown_as`; a model in memory runs each when it is asked for. To be called in
    inference mode.
    """
    if not isinstance(model, OpenedModel):
        model.eval()
        return lambda batch: model(input_ids=batches[batch].to(model.device), use_cache=False).logits
    model.model.eval()

    def shown(visits: Iterator[BlockRun]) -> Iterator[BlockRun]:
        yield from progress_bar(progress)(visits, total=len(model.blocks), desc=shown_as, unit="block")

    return walk_to_logits(model, batches, shown)
