"""What block transforms know of the inputs of a block's linears: mean magnitudes and diagonal blocks of the Hessian.

The block runs on all batches of its inputs, with the parameters that transforms before this one have changed, and the
processes of a gang share the batches out. Sums are in the order of the batches, whoever has them.

Shapes: S sequences, T tokens, D hidden size, I input channels, N groups of a row, B sequences of a batch, or within a
group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lqer.formats.blocks import BlockSize, to_blocks
from lqer.statistics import ALONE, Gang
from lqer.transforms.block_function import BlockFunction
from lqer.transforms.block_problem import BlockProblem
from lqer.transforms.tracing import trace, watched_inputs


@torch.no_grad()
def mean_magnitudes(
    call: BlockFunction, batches: Sequence[Tensor], linears: Sequence[str], gang: Gang = ALONE
) -> dict[str, Tensor]:
    """Mean |x| of every input channel over all tokens, float32 (I,), of the linears of these names.

    batches: hidden states (B, T, D). A linear that no token reaches, as of an expert, is missing.
    """
    sums: dict[str, Tensor] = {}

    def measure(name: str, x: Tensor) -> Tensor:
        return x.detach().abs().flatten(0, -2).sum(0, dtype=torch.float64)

    def add(name: str, sum_I: Tensor) -> None:
        sums[name] = sums[name] + sum_I if name in sums else sum_I

    _collect(call, {}, batches, linears, measure, add, gang)
    tokens = sum(hidden_BTD.shape[0] * hidden_BTD.shape[1] for hidden_BTD in batches)
    return {name: (sum_I / tokens).to(torch.float32) for name, sum_I in sums.items()}


@torch.no_grad()
def hessian_blocks(
    problem: BlockProblem, changed: Mapping[str, Tensor], block_sizes: Mapping[str, BlockSize]
) -> dict[str, Tensor]:
    """Per linear in `block_sizes` the diagonal blocks [N, B, B] of Σ x xᵀ over all tokens of its input, float32.

    changed: parameters that differ from the block's own. Inputs are not rounded. Linears called with one tensor and of
    one block size share theirs. A linear that no token reaches, as of an expert, has those of independent channels.
    """
    call = problem.call.without_rounding()
    sums: dict[tuple[str, BlockSize], Tensor] = {}
    with problem.in_autocast():
        seen = trace(call.block, lambda: call(changed, problem.inputs_STD[:1]))
        site_of = {linear: site[0] for site in seen.sites() for linear in site}
        del seen
        keys = {linear: (site_of.get(linear, linear), block_size) for linear, block_size in block_sizes.items()}
        one_of_each = {key: linear for linear, key in keys.items()}

        def measure(linear: str, x: Tensor) -> Tensor:
            return block_products(x.flatten(0, -2), block_sizes[linear])

        def add(linear: str, sum_NBB: Tensor) -> None:
            key = keys[linear]
            sums[key] = sums[key].add_(sum_NBB) if key in sums else sum_NBB

        batches = problem.inputs_STD.split(problem.batch_size)
        _collect(call, changed, batches, [*one_of_each.values()], measure, add, problem.gang)
    for key, linear in one_of_each.items():
        if key not in sums:
            weight_OI = call.block.get_parameter(f"{linear}.weight")
            sums[key] = block_products(torch.eye(weight_OI.shape[1], device=weight_OI.device), key[1])
    return {linear: sums[key] for linear, key in keys.items()}


def block_products(x_TI: Tensor, block_size: BlockSize) -> Tensor:
    """The diagonal blocks [N, B, B] of Σ x xᵀ, float32; a ragged last one is padded with zeros."""
    x_NBT = to_blocks(x_TI.to(torch.float32), block_size).permute(1, 2, 0)
    with torch.autocast(x_TI.device.type, enabled=False):
        return x_NBT @ x_NBT.transpose(1, 2)


def _collect(
    call: BlockFunction,
    changed: Mapping[str, Tensor],
    batches: Sequence[Tensor],
    linears: Sequence[str],
    measure: Callable[[str, Tensor], Tensor],
    add: Callable[[str, Tensor], None],
    gang: Gang,
) -> None:
    """`add` what `measure` says of the inputs of each linear, batch after batch."""

    def see(hidden_BTD: Tensor, found: Callable[[str, Tensor], None]) -> None:
        def watch(linear: str) -> Callable[[Tensor], None]:
            return lambda x: found(linear, measure(linear, x))

        with watched_inputs(call.block, {linear: watch(linear) for linear in linears}):
            call(changed, hidden_BTD)

    gang.collect(batches, see, add)
