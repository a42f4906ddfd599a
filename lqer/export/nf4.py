"""Weights in bitsandbytes' layout of NF4, the base of QLoRA: 4-bit `normal-float` with a scale for every 64 weights.

    weight uint8 [O I / 2, 1]              two codes a byte, the first in the high half
    weight.absmax float32 [O I / 64]       the scales, row after row
    weight.quant_map float32 [16]          the levels; its kernels have their own copy, rounded, 7e-7 apart
    weight.quant_state.bitsandbytes__nf4   JSON in bytes: type, block, dtype and shape

Rows are whole blocks, so that these blocks, of the flattened weight, are the checkpoint's. The scales are not quantized
once more.

Shapes: I in_features, O out_features.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lqer.export.shards import write_linears
from lqer.export.source import Linear, LinearSpec, Outline, Source
from lqer.formats import NormalFloat
from lqer.formats.normalfloat import levels
from lqer.models.coded import QUANTIZATION_CONFIG

BITS, BLOCK, NEAREST = 4, 64, "value"


def unsupported_nf4(spec: LinearSpec) -> str | None:
    """Why bitsandbytes would not decode a weight to the same values; None if it does."""
    one = spec.format
    if not isinstance(one, NormalFloat) or (one.bits, one.block_size, one.nearest) != (BITS, BLOCK, NEAREST):
        return f'it is not in normal-float of {BITS} bits, blocks of {BLOCK} and nearest = "{NEAREST}" (NF4)'
    return None if spec.in_features % BLOCK == 0 else f"{spec.in_features} inputs are not whole blocks of {BLOCK}"


def write_nf4(source: Source, folder: Path) -> None:
    """Write the weights of every linear without its factors, and everything else of the model."""
    write_linears(source, folder, nf4_tensors, {QUANTIZATION_CONFIG: nf4_config(source)})


def nf4_tensors(linear: Linear) -> dict[str, Tensor]:
    """The tensors of one weight by the last parts of their names."""
    parts, shape = linear.weight_OI.parts, linear.weight_OI.shape
    pairs = parts["codes"].view(-1, 2)
    # In float32 the weight is decoded without another rounding, and then takes the dtype of its inputs.
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "float32", "shape": list(shape)}
    return {
        "weight": (pairs[:, :1] << 4) | pairs[:, 1:],
        "weight.absmax": parts["scales"].float().flatten(),
        "weight.quant_map": torch.tensor(levels(BITS)),
        "weight.quant_state.bitsandbytes__nf4": torch.frombuffer(
            bytearray(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


def nf4_config(model: Outline) -> dict[str, Any]:
    """The entry of config.json."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": model.unquantized_linears(),
    }
