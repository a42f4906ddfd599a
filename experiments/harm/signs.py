"""Whether the error that a quantized block makes cancels the error that reaches it, or adds to it.

F is a block, Q the quantized one, h its input in the original model and h' in the quantized one:

    Q(h') - F(h)  =  [F(h') - F(h)]  +  [Q(h') - F(h')]          error behind the block = carried + own

Their cosine is below 0 where the block cancels what it receives. Errors count relative to ‖F(h)‖, by which the next
norm divides, and apart for tokens with massive streams (‖F(h)‖² above 100 medians). `shrink` is how much shorter the
quantized block's update is along the update itself:  -<own, u> / ‖u‖²,  u = F(h') - h'.

Shapes: B windows of a batch, T tokens of a window, D hidden size.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from harm.schemes import put
from harm.subject import Parameters
from harm.tokens import is_massive
from lqer.models.loaders import OpenedModel
from lqer.models.walker import BlockRun, embed


@dataclass(frozen=True)
class Signs:
    """Of one kind of tokens; nan where there are none.

    cosine: of carried and own error, mean over the blocks behind the first. own: root of the mean square of a block's
    own error, mean over blocks. end: the same of the whole error behind the last block.
    """

    cosine: float
    own: float
    end: float
    shrink: float


@torch.no_grad()
def error_signs(
    opened: OpenedModel, parameters: Parameters, windows_WT: Tensor, batch_size: int
) -> tuple[Signs, Signs]:
    """Of the tokens that are not massive, and of those that are."""
    batches = windows_WT.split(batch_size)
    originals, hidden = embed(opened, batches), embed(opened, batches)
    of_blocks = []
    for index, block in enumerate(opened.blocks):
        name = f"{opened.name}.{index}"
        original = BlockRun(index, name, block, originals, opened.device)
        run = BlockRun(index, name, block, hidden, opened.device)
        quantized = run.with_block(copy.deepcopy(block))
        put(quantized, parameters)
        sums = []
        for batch in range(len(batches)):
            outputs = [one.output(batch) for one in (original, run, quantized)]
            sums.append(error_sums(hidden.load(batch, opened.device), *outputs))
            original.keep(batch, outputs[0])
            quantized.keep(batch, outputs[2])
        of_blocks.append(torch.stack(sums).sum(0).cpu())
    rest, massive = torch.stack(of_blocks).unbind(1)
    return signs_of(rest), signs_of(massive)


def error_sums(given_BTD: Tensor, target_BTD: Tensor, same_BTD: Tensor, found_BTD: Tensor) -> Tensor:
    """By kind of token: the number of tokens and sums of the products that `signs_of` reads, relative to the stream."""
    given, target, same, found = (states.double() for states in (given_BTD, target_BTD, same_BTD, found_BTD))
    carried, own, update = same - target, found - same, same - given
    squares_BT = target.square().sum(-1)
    pairs = ((carried, carried), (own, own), (carried, own), (found - target, found - target), (own, update))
    values = [(a * b).sum(-1) / squares_BT for a, b in (*pairs, (update, update))]
    massive_BT = is_massive(squares_BT)
    return torch.stack([
        torch.stack([chosen_BT.sum().double(), *(value_BT[chosen_BT].sum() for value_BT in values)])
        for chosen_BT in (~massive_BT, massive_BT)
    ])  # fmt: skip


def signs_of(of_blocks: Tensor) -> Signs:
    """of_blocks: a row of `error_sums` for every block."""
    tokens, carried, own, both, whole, along, update = of_blocks.T
    return Signs(
        cosine=(both / (carried * own).sqrt())[1:].nanmean().item(),
        own=(own / tokens).sqrt().nanmean().item(),
        end=(whole / tokens).sqrt()[-1].item(),
        shrink=(-along / update).nanmean().item(),
    )
