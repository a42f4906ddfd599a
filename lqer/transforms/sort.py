"""Sorted channels: the largest inputs of a linear come first, so that inputs of one size share groups.

Between linears that write channels one by one and the linear that reads them (gate and up before down, fc1 before
fc2), channels may be in any order: rows of the writers and columns of the reader move together, and the block's
function stays.

    order    H_ii = E[x_i²], the largest first

Error feedback then begins with the columns whose errors cost most, with activation order, and their scales are still
fitted when the sweep reaches a group, to columns of about the same cost, in groups of adjacent columns as every engine
has them. Nothing is left to do at run time.

Which linears write the channels is found by trying, whatever the architecture: of linears that share an input and were
called before, the latest first, those with a row, or two halves of rows, for every channel are moved at random with the
columns. They are the writers if the block's output stays.

Shapes: B sequences, T tokens, D hidden size, I input channels of a reader, O rows of a writer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lqer.formats.blocks import BlockSize
from lqer.transforms.block_function import BlockFunction
from lqer.transforms.block_problem import BlockProblem
from lqer.transforms.block_result import BlockResult
from lqer.transforms.block_statistics import hessian_blocks
from lqer.transforms.block_transform import BlockTransform, Progress, SaveState
from lqer.transforms.tracing import enough_to_probe, output_stays, trace


@dataclass(frozen=True)
class Sort(BlockTransform):
    """`sort` as a configuration names it."""

    kind = "sort"

    @torch.no_grad()
    def apply(
        self, problem: BlockProblem, result: BlockResult, progress: Progress, save_state: SaveState
    ) -> BlockResult:
        """Sort the input channels of every linear where they can be moved. Raises ValueError after rounding."""
        if result.rounded:
            raise ValueError("sort must come before transforms that fix scales")
        progress(self.kind, 0, 1, None)
        call = problem.call.without_rounding()
        writers = {
            reader: names
            for reader, names in movable(call, enough_to_probe(problem.inputs_STD[: problem.batch_size])).items()
            if reader in problem.formats
        }
        each: dict[str, BlockSize] = dict.fromkeys(writers, 1)
        squares = hessian_blocks(problem, result.parameters, each)
        parameters = {name: parameter.detach() for name, parameter in call.block.named_parameters()}
        changed = dict(result.parameters)
        for reader, names in writers.items():
            order_I = squares[reader].flatten().argsort(descending=True, stable=True)
            changed |= moved(parameters | changed, reader, names, order_I)
        return replace(result, parameters=problem.in_stored_dtypes(changed)).with_note(
            self.kind, {reader: list(names) for reader, names in writers.items()}
        )


def moved(
    parameters: Mapping[str, Tensor], reader: str, writers: tuple[str, ...], order_I: Tensor
) -> dict[str, Tensor]:
    """The parameters of a block that change when the input channels of `reader` get another order (int64)."""
    changed = {f"{reader}.weight": parameters[f"{reader}.weight"][:, order_I]}
    for name in (f"{writer}.{part}" for writer in writers for part in ("weight", "bias")):
        if name in parameters:
            halves = parameters[name].unflatten(0, (-1, len(order_I)))
            changed[name] = halves[:, order_I].flatten(0, 1)
    return changed


@torch.no_grad()
def movable(call: BlockFunction, hidden_BTD: Tensor) -> dict[str, tuple[str, ...]]:
    """For each linear whose input channels may be in any order, the linears that write them.

    hidden_BTD: hidden states of real text.
    """
    first = next(call.block.parameters())
    hidden_BTD = hidden_BTD.to(first.device, first.dtype)
    parameters = {name: parameter.detach() for name, parameter in call.block.named_parameters()}
    seen = trace(call.block, lambda: call({}, hidden_BTD))
    sites = seen.sites()
    generator = torch.Generator().manual_seed(0)
    found = {}
    for i, (reader, *others) in enumerate(sites):
        channels = parameters[f"{reader}.weight"].shape[1]
        order_I = torch.randperm(channels, generator=generator).to(first.device)
        for site in reversed(sites[: 0 if others else i]):
            writers = tuple(name for name in site if len(parameters[f"{name}.weight"]) in (channels, 2 * channels))
            if not writers:
                continue
            changed = call(moved(parameters, reader, writers, order_I), hidden_BTD)
            if output_stays(changed, seen.result, hidden_BTD):
                found[reader] = writers
                break
    return found
