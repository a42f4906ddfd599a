"""Linears as a checkpoint holds them, made from random weights.

Shapes: I in_features, O out_features, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lqer.formats import MXInt, NumberFormat, QuantizedTensor
from lqer.transforms import Hadamard


def stored_linear(
    name: str,
    weight: NumberFormat,
    outputs: int,
    inputs: int,
    *,
    rank: int = 0,
    factor: NumberFormat | None = None,
    activation: NumberFormat | None = None,
    bias: NumberFormat | None = None,
    hadamard: bool = False,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Packed tensors by full names, and the entry of lqer.json. factor: along the inputs in A, the ranks in B."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    quantized = {"weight": weight.quantize(random(outputs, inputs) / inputs**0.5, axis=1)}
    if rank:
        quantized["low_rank_a"] = (factor or MXInt(bits=8)).quantize(random(inputs, rank) / inputs**0.5, axis=0)
        quantized["low_rank_b"] = (factor or MXInt(bits=8)).quantize(random(rank, outputs) / rank**0.5, axis=0)
    if bias is not None:
        quantized["bias"] = bias.quantize(random(outputs))
    entry: dict[str, Any] = {role: described(value) for role, value in quantized.items()}
    stored = {role: value.pack() for role, value in quantized.items()}
    if activation is not None:
        entry["activation"] = activation.to_dict()
    if hadamard:
        entry["transform"] = Hadamard().to_dict()
        stored["transform"] = Hadamard().rotation(outputs, inputs, seed).pack()
    tensors = {f"{name}.{role}.{part}": tensor for role, parts in stored.items() for part, tensor in parts.items()}
    return tensors, entry


def described(value: QuantizedTensor) -> dict[str, Any]:
    return {"format": value.format.to_dict(), "shape": list(value.shape), "axis": value.axis}
