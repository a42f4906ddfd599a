"""A folder in the compressed-tensors layout (`quant_method: "compressed-tensors"`), for vLLM, SGLang and transformers.

    number format                      layout                  tensors of a linear
    int, mxint, mx mxint8, 2..8 bits   pack-quantized          weight_packed int32 [O, ceil(I b / 32)], weight_scale
                                                               [O, G], weight_shape; asymmetric: weight_zero_point int32
                                                               [ceil(O b / 32), G]
    int8 a row with int8 a token       int-quantized           weight int8 [O, I], weight_scale [O, 1]
    mx mxfp4_e2m1                      mxfp4-pack-quantized    weight_packed uint8, weight_scale uint8 [O, I / 32]
    mx mxfp6_e2m3                      mxfp6-pack-quantized    the same
    mx mxfp8_e4m3                      mxfp8-quantized         weight float8 [O, I], weight_scale uint8 [O, I / 32]

The packed codes are those of the checkpoint. MXINT becomes integers with power-of-two scales, without loss. 3, 5, 6 and
7 bits are packed densely, as compressed-tensors does from version 0.18.0 on.

Shapes: I in_features, O out_features, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lqer.export.base import Target, Written, load_pretrained, unsupported_extras
from lqer.export.config_groups import (
    MX_GROUP,
    config_groups,
    is_float,
    is_w8a8,
    quantization_config,
    unsupported_together,
)
from lqer.export.integers import IntegerScheme, integer_schemes, integers_of, unsupported_integers, words
from lqer.export.shards import Shards
from lqer.export.source import CONFIG_FILE, QUANTIZATION_CONFIG, Linear, LinearSpec, Outline, Source
from lqer.formats import pack_bits
from lqer.store.files import write_json


@dataclass(frozen=True)
class CompressedTensors(Target):
    """compressed-tensors, for vLLM, SGLang and transformers."""

    kind = "compressed-tensors"
    readers = ("transformers", "compressed_tensors")
    tags = ("compressed-tensors",)

    def unsupported(self, spec: LinearSpec) -> str | None:
        return unsupported_extras(spec) or unsupported_weight(spec)

    def unsupported_model(self, model: Outline) -> tuple[str, str] | None:
        return unsupported_together(model)

    def keeps_activation(self, spec: LinearSpec) -> bool:
        return spec.activation is None or is_w8a8(spec)

    def write(self, source: Source, folder: Path) -> Written:
        write_packed(source, folder)
        groups = set(config_groups(source).values())
        notes = []
        if any(is_float(spec) for spec in source.specs.values()):
            notes.append("compressed-tensors dequantizes MX floats to bfloat16: load the model with dtype=bfloat16.")
        packed_bits = {dict(group.weights)["num_bits"] for group in groups if group.layout == "pack-quantized"}
        if packed_bits - {2, 4, 8}:
            notes.append("3, 5, 6 and 7 bits are packed as compressed-tensors 0.18.0 and later read them.")
        # The library divides by 127.5 where lqer and vLLM's kernels divide an activation's largest magnitude by 127.
        return Written("other inputs" if any(group.activations for group in groups) else "exact", tuple(notes))

    def load(self, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        return load_pretrained(folder, dtype)

    def dtype_of_check(self, source: Source) -> torch.dtype:
        return torch.bfloat16 if any(is_float(spec) for spec in source.specs.values()) else torch.float32

    def commands(self, folder: str, source: Source) -> Mapping[str, str]:
        return {
            "transformers": f'AutoModelForCausalLM.from_pretrained("{folder}")   # pip install compressed-tensors',
            "vLLM": f"vllm serve {folder}",
            "lm-eval": f"lm_eval run --model hf --model_args pretrained={folder} --tasks arc_easy",
        }


def unsupported_weight(spec: LinearSpec) -> str | None:
    """Why a weight matrix has no such layout, whatever stands beside it; None if it has one."""
    if is_float(spec):
        if spec.format.block_size != MX_GROUP:
            return f"MX floats are stored in blocks of {MX_GROUP}, not of {spec.format.block_size}"
        return (
            None
            if spec.in_features % MX_GROUP == 0
            else f"{spec.in_features} inputs are not whole blocks of {MX_GROUP}"
        )
    return unsupported_integers(spec.format)


def write_packed(source: Source, folder: Path) -> None:
    """Write the weights of every linear without its factors, and everything else of the model."""
    schemes = integer_schemes(source.specs.values())
    shards = Shards(folder)
    for linears, others in source.read():
        for linear in linears:
            packed = packed_weight(linear, schemes[linear.name])
            shards.add({f"{linear.name}.{part}": tensor for part, tensor in packed.items()} | linear.biases)
        shards.add(others)
    shards.close()
    write_json(folder / CONFIG_FILE, {**source.config, QUANTIZATION_CONFIG: quantization_config(source)})
    source.copy_surroundings(folder)


def packed_weight(linear: Linear, scheme: IntegerScheme) -> dict[str, Tensor]:
    """The tensors of one weight by the last part of their names."""
    spec, weight_OI = linear.spec, linear.weight_OI
    if is_float(spec):
        codes_OI, exponents_OG = weight_OI.parts["codes"], weight_OI.parts["exponents"]
        if scheme.bits == 8:
            return {"weight": codes_OI.view(torch.float8_e4m3fn), "weight_scale": exponents_OG}
        return {"weight_packed": pack_bits(codes_OI, scheme.bits), "weight_scale": exponents_OG}
    integers = integers_of(weight_OI).regrouped(scheme.group)
    scale_OG = integers.scales_OG.to(integers.scale_dtype)
    if is_w8a8(spec):
        return {"weight": integers.signed().to(torch.int8), "weight_scale": scale_OG}
    packed = {
        "weight_packed": words(integers.codes_OI, scheme.bits),
        "weight_scale": scale_OG,
        "weight_shape": torch.tensor(weight_OI.shape),
    }
    if not scheme.symmetric:
        packed["weight_zero_point"] = words(integers.zeros_OG.T.contiguous(), scheme.bits).T
    return packed
