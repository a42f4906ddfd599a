"""Decoders of Llama-7B's shape with random weights: in bf16, and with packed linears.

The model is built in bf16 on the GPU; a packed one with a single block, whose linears are packed, with a random
low-rank branch where the scheme has one. The other blocks are copies of that, each with memory of its own. Linears that
read the same input are joined as `load_quantized` joins them; attention of one token and the compiler's settings are
those of `compile_decode`. The bf16 model has a row as torch runs it and one with both of these. Trellis and lattice
codes are random, which takes the same time and needs no search. The embeddings and the output layer stay bf16.

Shapes: I in_features, O out_features, R rank.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lqer.formats import E8P, Int, MXInt, NumberFormat, QuantizedTensor, Trellis
from lqer.formats.trellis import TILE
from lqer.transforms.hadamard import RandomHadamard, random_hadamard

CONFIG = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
}
FACTOR = MXInt(8)  # of A and B
X8 = MXInt(8)
LOW_RANK_NORM = 0.1  # of a column of B relative to a row of W


@dataclass(frozen=True)
class Scheme:
    """How linears are packed: quantize(W) with rank and activation format; rotated: within both Hadamard transforms."""

    quantize: Callable[[Tensor], QuantizedTensor]
    rank: int = 0
    activation: NumberFormat | None = None
    rotated: bool = False


def _random_lattice(weight_OI: Tensor) -> QuantizedTensor:
    lattice, (outputs, inputs) = E8P(2), weight_OI.shape
    codes = torch.randint(0, 1 << 16, (outputs, inputs // lattice.vector_size), device=weight_OI.device)
    parts = {"codes": codes, "scales": weight_OI.float().std().view(1, 1)}
    return QuantizedTensor(lattice, (outputs, inputs), 1, parts)


def _random_trellis(bits: int) -> Callable[[Tensor], QuantizedTensor]:
    def quantize(weight_OI: Tensor) -> QuantizedTensor:
        outputs, inputs = weight_OI.shape
        shape = outputs // TILE, TILE * inputs
        codes = torch.randint(0, 1 << bits, shape, device=weight_OI.device, dtype=torch.uint8)
        parts = {"codes": codes, "scales": weight_OI.float().std().view(1, 1)}
        return QuantizedTensor(Trellis(bits, table="bytes"), (outputs, inputs), 1, parts)

    return quantize


BF16, BF16_ATTENTION = "bf16", "bf16-attention"
SCHEMES: dict[str, Scheme | None] = {
    BF16: None,
    BF16_ATTENTION: None,
    "int4-g128": Scheme(Int(4, 128).quantize),
    "w4a8-rank32": Scheme(MXInt(4).quantize, 32, X8),
    "e8p-rank64": Scheme(_random_lattice, 64, rotated=True),
    "trellis2": Scheme(_random_trellis(2), rotated=True),
    "trellis3": Scheme(_random_trellis(3), rotated=True),
}


def known_scheme(name: str) -> str:
    """The type of a command line's argument: a key of SCHEMES."""
    if name not in SCHEMES:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(SCHEMES)}")
    return name


LABELS = {
    BF16: "bf16",
    BF16_ATTENTION: "bf16, attention and compilation of the packed models",
    "int4-g128": "INT4 g128 asymmetric",
    "w4a8-rank32": "W4A8 MXINT + rank 32",
    "e8p-rank64": "2-bit E8P + rank 64, both Hadamards",
    "trellis2": "2-bit trellis (bytes), both Hadamards",
    "trellis3": "3-bit trellis (bytes), both Hadamards",
}


def build(scheme: str, config: dict[str, Any], device: torch.device, joined: bool = True) -> nn.Module:
    """The model of a scheme. joined: linears that read the same input run as one."""
    packing, blocks = SCHEMES[scheme], config["num_hidden_layers"]
    model: Any = _dense(config if packing is None else {**config, "num_hidden_layers": 1}, device)
    if packing is not None:
        _pack_in_place(model.model.layers[0], packing)
        if joined:
            from lqer.checkpoint.siblings import join_siblings

            join_siblings(model, model.model.layers)
        # The configuration stays that of the model.
        known = {id(model.config): model.config}
        model.model.layers.extend(copy.deepcopy(model.model.layers[0], dict(known)) for _ in range(1, blocks))
        for index, block in enumerate(model.model.layers):
            block.self_attn.layer_idx = index
        model.config.num_hidden_layers = blocks
    if scheme != BF16:
        from lqer.checkpoint.one_token import attend_by_kernel

        attend_by_kernel(model)
    return model


def _dense(config: dict[str, Any], device: torch.device) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(LlamaConfig(**config)).eval()
    finally:
        torch.set_default_dtype(previous)


@torch.no_grad()
def _pack_in_place(block: nn.Module, scheme: Scheme) -> None:
    from lqer.kernels import PackedLinear, TritonLinear

    linears = {name: child for name, child in block.named_modules() if isinstance(child, nn.Linear)}
    for place, (name, linear) in enumerate(linears.items()):
        weight_OI = linear.weight
        outputs, inputs = weight_OI.shape
        rotation = _rotation(outputs, inputs, place, weight_OI.device) if scheme.rotated else None
        a_IR, b_RO = _branch(weight_OI, scheme.rank) if scheme.rank else (None, None)
        packed = PackedLinear.pack(
            scheme.quantize(weight_OI), a_IR, b_RO, None, scheme.activation, torch.bfloat16, rotation
        )
        block.set_submodule(name, TritonLinear(packed))


def _branch(weight_OI: Tensor, rank: int) -> tuple[QuantizedTensor, QuantizedTensor]:
    outputs, inputs = weight_OI.shape
    a_IR = torch.randn(inputs, rank, device=weight_OI.device) * inputs**-0.5
    b_RO = torch.randn(rank, outputs, device=weight_OI.device) * weight_OI.std().float() * LOW_RANK_NORM
    return FACTOR.quantize(a_IR, axis=0), FACTOR.quantize(b_RO, axis=0)


def _rotation(outputs: int, inputs: int, place: int, device: torch.device) -> RandomHadamard:
    """Inputs of one width have the same signs, as in a checkpoint."""
    shared, own = random_hadamard(outputs, inputs, 0), random_hadamard(outputs, inputs, place)
    return RandomHadamard(shared.input_signs_I.to(device), own.output_signs_O.to(device))
