"""Kernels of other projects, installed separately.

Written for humming-kernels 0.1.19 and gemlite 0.6.0.post2. Both represent MXINT4 with blocks of 16 exactly: signed
4-bit integers times a power of two.

Shapes: M rows of x, I in_features, O out_features, G groups along K.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lqer.formats import MXInt, QuantizedTensor
from lqer.formats.blocks import e8m0_to_float

# State, and the function that applies a copy of it to x_MI.
Peer = tuple[Any, Callable[[Any, Tensor], Tensor]]

PACKAGES = ("gemlite", "humming-kernels", "triton", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Version of every package in the comparison, or "not installed"."""
    found = {"torch": str(torch.__version__)}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def offset_codes_and_scales(weight: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """uint8 codes (O, I) with 8 added, and the bf16 step (O, G), of MXINT4 weights (O, I)."""
    number_format = _require_mxint4(weight)
    codes_OI = (weight.parts["codes"] + number_format.code_offset).view(torch.uint8)
    steps_OG = e8m0_to_float(weight.parts["exponents"]) * 2.0**-number_format.fraction_bits
    return codes_OI, steps_OG.to(torch.bfloat16)


def gemlite_int4(weight: QuantizedTensor) -> Peer:
    """gemlite: uint4 codes, bf16 scales, zero point 8; it tunes itself on the first call with an M."""
    from gemlite import DType, GemLiteLinear
    from gemlite.core import forward_functional

    n, k = weight.shape
    codes_OI, scales_OG = offset_codes_and_scales(weight)
    layer = GemLiteLinear(
        4,
        group_size=weight.format.block_size,
        in_features=k,
        out_features=n,
        input_dtype=DType.BF16,
        output_dtype=DType.BF16,
    )
    layer.pack(codes_OI, scales_OG.reshape(-1, 1), zeros=8)
    settings = layer.get_meta_args()
    tensors = [tensor.detach() for tensor in layer.get_tensor_args()]
    return tensors, lambda tensors, x_MI: forward_functional(x_MI, None, tensors, settings)


def humming_int4(weight: QuantizedTensor, m: int) -> Peer:
    """humming: uint4 codes and E8M0 scales; the kernel that its own tables choose for M, compiled on the first call."""
    # The wheel contains a compiled launcher; without this an import starts two processes that build it again.
    os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")
    if shutil.which("nvcc"):  # its default, NVRTC, needs the toolkit's headers in a place of its own
        os.environ.setdefault("HUMMING_COMPILER", "nvcc")
    from humming import ops
    from humming.forward import humming_forward
    from humming.layer import HummingLayer
    from humming.tune import get_heuristics_config

    n, k = weight.shape
    number_format = _require_mxint4(weight)
    codes_OI, _ = offset_codes_and_scales(weight)
    config = {"dtype": "int4", "group_size": number_format.block_size, "scale_dtype": "float8e8m0"}
    layer = HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=torch.bfloat16).to(codes_OI.device)
    exponents_OG = weight.parts["exponents"] - number_format.fraction_bits
    layer.load_from_tensors(
        {
            "weight": ops.pack_weight(codes_OI.to(torch.int32), number_format.bits),
            "weight_scale": exponents_OG.view(torch.float8_e8m0fnu),
        }
    )
    layer.transform()
    names = ("weight", "weight_scale", "weight_scale_2", "zero_point", "locks")
    tensors = {name: getattr(layer, name).detach() for name in names if getattr(layer, name, None) is not None}
    layer_config = layer.humming_config
    tuning = json.dumps(get_heuristics_config(layer_config, shape_m=m, device=codes_OI.device))

    def run(tensors: dict[str, Tensor], x_MI: Tensor) -> Tensor:
        return humming_forward(layer_config, inputs=x_MI, tuning_config=tuning, **tensors)

    return tensors, run


def _require_mxint4(weight: QuantizedTensor) -> MXInt:
    number_format = weight.format
    if not isinstance(number_format, MXInt) or number_format.bits != 4 or weight.axis != 1:
        raise ValueError(f"peers support MXINT4 along axis 1 only, found {number_format} along axis {weight.axis}")
    return number_format
