"""What one rank of tensor parallelism holds of a quantized linear, and several linears as one.

                   split by outputs (q, k, v, gate, up)        split by inputs (o, down)
    weight         rows                                        columns, whole blocks; scales of rows go to every rank
    A, B           A on every rank, columns of B               rows of A, B on every rank
    bias           its share                                   whole, for whoever adds it once
    Q(x)           as without sharding                         as without sharding, if blocks of x are whole
    Q(Q(x A) B)    as without sharding, if blocks of y are     after the sum of x A over all ranks (modules.py)
    a rotation     mixes all outputs: refused                  mixes all inputs: refused

All functions raise ValueError, with the rule, for what would compute something else than the whole linear.

Shapes: I in_features, O out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lqer.checkpoint.linear import LinearTensors
from lqer.checkpoint.pack import FACTOR_ROLES
from lqer.formats import NumberFormat, Passthrough, QuantizedTensor, cut, join

A_ROLES = tuple(role for role in FACTOR_ROLES if role.endswith("_a"))


def output_shard(linear: LinearTensors, start: int, count: int) -> LinearTensors:
    """The linear of `count` outputs from `start` on."""
    if count == linear.weight.shape[0]:
        return linear
    if linear.rotation is not None:
        raise ValueError('a "hadamard" basis mixes all outputs, so they cannot be split: run it on one rank')
    weight = _cut("weight", linear.weight, 0, start, count)
    if linear.factors:
        _require_whole_blocks(linear.activation, "outputs", (start, start + count), linear.weight.shape[0])
    factors = {
        role: factor if role in A_ROLES else _cut(role, factor, 1, start, count)
        for role, factor in linear.factors.items()
    }
    bias_O = None if linear.bias_O is None else linear.bias_O[start : start + count]
    return replace(linear, weight=weight, factors=factors, bias_O=bias_O)


def input_shard(linear: LinearTensors, start: int, count: int) -> LinearTensors:
    """The linear of `count` inputs from `start` on; outputs of all shards add up to those of the whole.

    With factors and rounded inputs that holds for the sum of x A, not for what follows it.
    """
    if count == linear.weight.shape[1]:
        return linear
    if linear.rotation is not None:
        raise ValueError('a "hadamard" basis mixes all inputs, so they cannot be split: run it on one rank')
    _require_whole_blocks(linear.activation, "inputs", (start, start + count), linear.weight.shape[1])
    factors = {
        role: _cut(role, factor, 0, start, count) if role in A_ROLES else factor
        for role, factor in linear.factors.items()
    }
    return replace(linear, weight=_cut("weight", linear.weight, 1, start, count), factors=factors)


def join_outputs(linears: Sequence[LinearTensors]) -> LinearTensors:
    """Linears of one input, without their biases, as one whose outputs are theirs one after another.

    A is theirs side by side, B block-diagonal. Raises ValueError where formats differ or blocks would be cut: such
    linears run one after another.
    """
    first, total = linears[0], sum(linear.weight.shape[0] for linear in linears)
    if any(linear.activation != first.activation for linear in linears):
        raise ValueError("their inputs are rounded differently")
    if any(linear.rotation is not None for linear in linears):
        raise ValueError('each has a "hadamard" basis of its own')
    if len({tuple(sorted(linear.factors)) for linear in linears}) > 1:
        raise ValueError("some have low-rank factors and others have none")
    factors: dict[str, QuantizedTensor] = {}
    for role in first.factors:
        stored = [linear.factors[role] for linear in linears]
        factors[role] = join(stored, 1) if role in A_ROLES else _block_diagonal(stored)
        if role in A_ROLES:
            _require_whole_blocks(first.activation, "ranks", _edges([factor.shape[1] for factor in stored]), 0)
    if factors:
        _require_whole_blocks(first.activation, "outputs", _edges([one.weight.shape[0] for one in linears]), total)
    return LinearTensors(join([linear.weight for linear in linears], 0), factors, None, first.activation, None)


def _cut(role: str, tensor: QuantizedTensor, dim: int, start: int, count: int) -> QuantizedTensor:
    try:
        return cut(tensor, dim, start, count)
    except ValueError as error:
        raise ValueError(f"{role}: {error}") from None


def _edges(sizes: Sequence[int]) -> list[int]:
    """Where each but the first of several pieces begins."""
    return [sum(sizes[:index]) for index in range(1, len(sizes))]


def _require_whole_blocks(activation: NumberFormat | None, of: str, edges: Sequence[int], size: int) -> None:
    """Refuse edges within the values that are rounded under one scale; `size` is an edge in any case."""
    if activation is None or isinstance(activation, Passthrough):
        return
    block = activation.block_size
    for edge in edges:
        if isinstance(block, str):
            raise ValueError(f'all {of} are rounded under one scale (block_size "{block}")')
        if edge % block and edge != size:
            raise ValueError(f"{of} are rounded in blocks of {block}, and {edge} is not a multiple of that")


def _block_diagonal(factors: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """B of several linears as one: (sum of ranks, sum of outputs), zero where rank and output are not of one linear."""
    rows = []
    for place, factor in enumerate(factors):
        row = [factor if index == place else _zeros(factor, other.shape[1]) for index, other in enumerate(factors)]
        rows.append(join(row, 1))
    return join(rows, 0)


def _zeros(like: QuantizedTensor, outputs: int) -> QuantizedTensor:
    device = like.parts["codes"].device
    return like.format.quantize(torch.zeros(like.shape[0], outputs, device=device), like.axis)
