"""A folder in AWQ's layout (`quant_method: "awq"`, version "gemm"), for vLLM, SGLang and GPTQModel: 4 bits.

    qweight int32 [I, O / 8]   eight codes of neighbouring outputs in a word, in the order 0 2 4 6 1 3 5 7
    qzeros int32 [G, O / 8]    zero points, packed alike
    scales float16 [G, O]

Any zero point can be stored; symmetric codes have 8.

Shapes: I in_features, O out_features, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AwqConfig, PreTrainedModel
from transformers.utils.quantization_config import AwqBackend

from lqer.export.base import Target, Written, load_pretrained, unsupported_extras
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

BITS = 4
OUTPUTS_PER_WORD = 8
# The output in each nibble of a word, the lowest first.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Awq(Target):
    """AWQ's layout of 4-bit integers, for vLLM, SGLang and GPTQModel."""

    kind = "awq"
    readers = ("gptqmodel",)
    tags = ("awq",)

    def unsupported(self, spec: LinearSpec) -> str | None:
        if (reason := unsupported_extras(spec) or unsupported_integers(spec.format)) is not None:
            return reason
        if (bits := spec.format.stream_widths["codes"]) != BITS:
            return f"its codes have {bits} bits, and the layout's have {BITS}"
        if spec.out_features % OUTPUTS_PER_WORD:
            return f"{spec.out_features} outputs are not whole words of {OUTPUTS_PER_WORD}"
        return unsupported_scales(spec)

    def unsupported_model(self, model: Outline) -> tuple[str, str] | None:
        return unsupported_uniform(model)

    def write(self, source: Source, folder: Path) -> Written:
        schemes = integer_schemes(source.specs.values())

        def tensors_of(linear: Linear) -> dict[str, Tensor]:
            return awq_tensors(integers_of(linear.weight_OI).regrouped(schemes[linear.name].group), linear.spec)

        config = self._config(source, next(iter(schemes.values())))
        write_linears(source, folder, tensors_of, {QUANTIZATION_CONFIG: config})
        return Written(
            "rounded", ("GPTQModel multiplies in float16: its logits differ a little from the checkpoint's.",)
        )

    def _config(self, source: Source, scheme: IntegerScheme) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": scheme.bits,
            "group_size": -1 if scheme.group is None else scheme.group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": source.unquantized_linears(),
        }

    def load(self, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        return load_pretrained(folder, dtype, quantization_config=AwqConfig(backend=AwqBackend.TORCH_AWQ))

    def commands(self, folder: str, source: Source) -> Mapping[str, str]:
        scheme = next(iter(integer_schemes(source.specs.values()).values()))
        loaded = {
            "transformers": "# pip install gptqmodel\n"
            "from transformers import AutoModelForCausalLM, AwqConfig\n\n"
            'choice = AwqConfig(backend="torch_awq")\n'
            f'model = AutoModelForCausalLM.from_pretrained("{folder}", quantization_config=choice)'
        }
        return loaded | ({"vLLM": f"vllm serve {folder} --dtype float16"} if scheme.group in VLLM_GROUPS else {})


def awq_tensors(integers: Integers, spec: LinearSpec) -> dict[str, Tensor]:
    """The tensors of one linear. Raises ExportError for a scale that is not a float16."""
    return {
        "qweight": _packed(integers.codes_OI.T),
        "qzeros": _packed(integers.zeros_OG.T),
        "scales": float16_scales(integers, spec).T,
    }


def _packed(codes_IO: Tensor) -> Tensor:
    """int32 [I, O / 8] of uint8 codes."""
    ordered_IO = codes_IO.unflatten(1, (-1, OUTPUTS_PER_WORD))[..., list(ORDER)].flatten(1)
    return words(ordered_IO.contiguous(), BITS)
