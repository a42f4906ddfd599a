"""A folder in the compressed-tensors layout (`quant_method: "compressed-tensors"`), for vLLM, SGLang and transformers.

    number format                      layout                  tensors of a linear
    int, mxint, mx mxint8, 2..8 bits   pack-quantized          weight_packed int32 [O, ceil(I b / 32)], weight_scale
                                                               [O, G], weight_shape; asymmetric: weight_zero_point int32
                                                               [ceil(O b / 32), G]
    int8 a row with int8 a token       int-quantized           weight int8 [O, I], weight_scale [O, 1]
    mx mxfp4_e2m1                      mxfp4-pack-quantized    weight_packed uint8, weight_scale uint8 [O, I / 32]
    mx mxfp6_e2m3                      mxfp6-pack-quantized    the same
    mx mxfp8_e4m3                      mxfp8-quantized         weight float8 [O, I], weight_scale uint8 [O, I / 32]

The linears of experts are stored one by one under the names that the original's files have for them, as
`block_sparse_moe.experts.17.w1`, and so is all else of such a model.

The packed codes are those of the checkpoint. MXINT becomes integers with power-of-two scales, without loss. 3, 5, 6 and
7 bits are packed densely, as compressed-tensors does from version 0.18.0 on.

transformers does not load zero points beside another layout, as of several widths. vLLM's reader does, and with
`engine = "vllm"` such files are written, and decoded for the comparison by compressed-tensors itself.

Shapes: I in_features, O out_features, G groups of a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lqer.components import require_choice
from lqer.export.base import Target, Written, load_pretrained, load_weights, unsupported_extras
from lqer.export.config_groups import (
    MX_GROUP,
    config_groups,
    is_float,
    is_w8a8,
    quantization_config,
    unsupported_experts,
    unsupported_in_transformers,
    unsupported_together,
    unsupported_zero_points,
)
from lqer.export.integers import IntegerScheme, integer_schemes, integers_of, unsupported_integers, words
from lqer.export.packed_readers import decompressed, is_served, loads_in_transformers
from lqer.export.shards import Shards
from lqer.export.source import CONFIG_FILE, Linear, LinearSpec, Outline, Source
from lqer.formats import pack_bits
from lqer.models.coded import QUANTIZATION_CONFIG
from lqer.nn.stacked import stacks
from lqer.store.files import write_json


@dataclass(frozen=True)
class CompressedTensors(Target):
    """compressed-tensors, for vLLM, SGLang and transformers.

    engine: what must be able to load the files. "vllm": also those with several widths and zero points.
    """

    kind = "compressed-tensors"
    readers = ("transformers", "compressed_tensors")
    tags = ("compressed-tensors",)

    engine: Literal["transformers", "vllm"] = "transformers"

    def __post_init__(self) -> None:
        require_choice("engine", self.engine, ["transformers", "vllm"], self.kind)

    def unsupported(self, spec: LinearSpec) -> str | None:
        return unsupported_extras(spec) or unsupported_weight(spec)

    def unsupported_model(self, model: Outline) -> tuple[str, str] | None:
        check = unsupported_in_transformers if self.engine == "transformers" else unsupported_zero_points
        return check(model) or unsupported_together(model)

    def unsupported_experts(self, model: Outline) -> tuple[str, str] | None:
        return unsupported_experts(model)

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
        if unsupported_in_transformers(source) is not None:
            notes.append(
                "transformers does not load zero points beside other layouts; compressed-tensors decodes them."
            )
        if source.expert_linears:
            notes.append(
                "transformers decodes experts to the dtype of their scales: cast them to the model's after loading."
            )
        # The library divides by 127.5 where lqer and vLLM's kernels divide an activation's largest magnitude by 127.
        return Written("other inputs" if any(group.activations for group in groups) else "exact", tuple(notes))

    def load(self, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))[QUANTIZATION_CONFIG]
        if loads_in_transformers(config):
            model = load_pretrained(folder, dtype)
            for name in stacks(model):
                # They have the dtype of their scales.
                parameter = model.get_parameter(name)
                parameter.data = parameter.data.to(dtype)
            return model
        return load_weights(folder, decompressed(folder, config), dtype)

    def dtype_of_check(self, source: Source) -> torch.dtype:
        return torch.bfloat16 if any(is_float(spec) for spec in source.specs.values()) else torch.float32

    def commands(self, folder: str, source: Source) -> Mapping[str, str]:
        served = {"vLLM": f"vllm serve {folder}"} if is_served(source) else {}
        if self.engine == "vllm":
            return served
        return {
            "transformers": "# pip install compressed-tensors\n"
            "from transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{folder}")',
            **served,
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
    names = source.saved_names if source.expert_linears else {}
    shards = Shards(folder)
    for linears, others in source.read():
        for linear in linears:
            packed = packed_weight(linear, schemes[linear.name])
            name = names.get(f"{linear.name}.weight", f"{linear.name}.weight").removesuffix(".weight")
            shards.add({f"{name}.{part}": tensor for part, tensor in packed.items()})
            others |= linear.biases
        shards.add({names.get(name, name): tensor for name, tensor in others.items()})
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
