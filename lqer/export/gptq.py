"""A folder in GPTQ's layout (`quant_method: "gptq"`), for GPTQModel, vLLM and SGLang.

    qweight int32 [I b / 32, O]   a stream of b-bit codes down the inputs
    qzeros int32 [G, O b / 32]    a stream of zero points along the outputs; version 1 stores them minus one
    scales float16 [G, O]
    g_idx int32 [I]               the group of each input, i // g: lqer leaves columns in their place

Version 1 cannot store a zero point of 0, which an asymmetric group without negative values has. vLLM reads symmetric
codes alone, of 4 and 8 bits, in groups of 32, 64 or 128 or of a row.

Shapes: I in_features, O out_features, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GPTQConfig, PreTrainedModel

import lqer
from lqer.components import require_choice
from lqer.export.base import Target, Written, load_pretrained, refuse_value, unsupported_extras
from lqer.export.integers import (
    VLLM_GROUPS,
    Integers,
    IntegerScheme,
    float16_scales,
    integer_schemes,
    integers_of,
    unsupported_integers,
    unsupported_scales,
    unsupported_uniform,
    words,
)
from lqer.export.shards import write_linears
from lqer.export.source import Linear, LinearSpec, Outline, Source
from lqer.models.coded import QUANTIZATION_CONFIG
from lqer.store.files import write_json

BITS = (2, 3, 4, 8)
WORD_BITS = 32
# What vLLM's kernels for this layout take.
VLLM_BITS = (4, 8)


@dataclass(frozen=True)
class Gptq(Target):
    """GPTQ's layout, for GPTQModel, vLLM and SGLang. version: 1 is what every engine reads, 2 stores any zero point."""

    kind = "gptq"
    readers = ("gptqmodel", "optimum")
    tags = ("gptq",)

    version: Literal["1", "2"] = "1"

    def __post_init__(self) -> None:
        require_choice("version", self.version, ["1", "2"], self.kind)

    def unsupported(self, spec: LinearSpec) -> str | None:
        if (reason := unsupported_extras(spec) or unsupported_integers(spec.format)) is not None:
            return reason
        bits = spec.format.stream_widths["codes"]
        if bits not in BITS:
            return f"{bits} bits are not one of {', '.join(map(str, BITS))}"
        if spec.in_features * bits % WORD_BITS or spec.out_features * bits % WORD_BITS:
            return f"{spec.out_features} x {spec.in_features} codes of {bits} bits do not fill words of {WORD_BITS}"
        return unsupported_scales(spec)

    def unsupported_model(self, model: Outline) -> tuple[str, str] | None:
        return unsupported_uniform(model)

    def write(self, source: Source, folder: Path) -> Written:
        schemes = integer_schemes(source.specs.values())
        zero_offset = 1 if self.version == "1" else 0

        def tensors_of(linear: Linear) -> dict[str, Tensor]:
            integers = integers_of(linear.weight_OI).regrouped(schemes[linear.name].group)
            return gptq_tensors(integers, linear.spec, zero_offset)

        config = self._config(next(iter(schemes.values())))
        write_linears(source, folder, tensors_of, {QUANTIZATION_CONFIG: config})
        write_json(folder / "quantize_config.json", config)
        return Written(
            "rounded", ("GPTQModel multiplies in float16: its logits differ a little from the checkpoint's.",)
        )

    def _config(self, scheme: IntegerScheme) -> dict[str, Any]:
        layout = "gptq" if self.version == "1" else "gptq_v2"
        return {
            "quant_method": "gptq",
            "bits": scheme.bits,
            "group_size": -1 if scheme.group is None else scheme.group,
            "desc_act": False,
            "sym": scheme.symmetric,
            "lm_head": False,
            "format": layout,
            "checkpoint_format": layout,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"lqer:{lqer.__version__}"]},
        }

    def load(self, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        # Named: the automatic choice compiles C++ for minutes.
        return load_pretrained(folder, dtype, quantization_config=GPTQConfig(bits=4, backend="torch"))

    def commands(self, folder: str, source: Source) -> Mapping[str, str]:
        scheme = next(iter(integer_schemes(source.specs.values()).values()))
        loaded = {
            "transformers": "# pip install gptqmodel optimum\n"
            "from transformers import AutoModelForCausalLM, GPTQConfig\n\n"
            f'choice = GPTQConfig(bits={scheme.bits}, backend="torch")\n'
            f'model = AutoModelForCausalLM.from_pretrained("{folder}", quantization_config=choice)'
        }
        is_served = scheme.symmetric and scheme.bits in VLLM_BITS and scheme.group in VLLM_GROUPS
        return loaded | ({"vLLM": f"vllm serve {folder} --dtype float16"} if is_served else {})


def gptq_tensors(integers: Integers, spec: LinearSpec, zero_offset: int) -> dict[str, Tensor]:
    """The tensors of one linear. zero_offset: what is taken off the zero points. Raises ExportError for values."""
    if zero_offset and not bool((integers.zeros_OG > 0).all()):
        raise refuse_value(spec, "a zero point is 0, which version 1 cannot store (--version=2 can)")
    zeros_GO = (integers.zeros_OG - zero_offset).T.contiguous()
    in_features = integers.codes_OI.shape[1]
    return {
        "qweight": words(integers.codes_OI, integers.bits).T,
        "qzeros": words(zeros_GO, integers.bits),
        "scales": float16_scales(integers, spec).T,
        "g_idx": (torch.arange(in_features) // integers.group).to(torch.int32),
    }
