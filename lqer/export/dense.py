"""A plain model with dequantized weights: what any program that knows the architecture can load.

Low-rank factors are merged and rotations folded into the weight, W = Uᵀ (W_q + (A B)ᵀ) V, with the inputs' rotation at
run time on the right of it. So every weight-only method and transform can be carried; what the checkpoint rounds at run
time, activations and operands of attention, cannot.

Shapes: I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lqer.components import require_choice
from lqer.export.base import Target, Written, load_pretrained, unsupported_extras
from lqer.export.shards import Shards
from lqer.export.source import CONFIG_FILE, Linear, LinearSpec, Outline, Source
from lqer.models.source import DTYPES
from lqer.store.files import write_json


@dataclass(frozen=True)
class Dense(Target):
    """Plain safetensors of the dequantized weights.

    dtype: of the quantized linears' weights. Other tensors keep the one in which the checkpoint holds them. Experts are
    stacked as transformers holds them.
    """

    kind = "dense"
    readers = ("transformers",)
    tags = ("fake-quant",)

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, list(DTYPES), self.kind)

    def unsupported(self, spec: LinearSpec) -> str | None:
        return None

    def unsupported_experts(self, model: Outline) -> tuple[str, str] | None:
        return None

    @property
    def most_bits(self) -> float:
        return 8.0 * DTYPES[self.dtype].itemsize

    def write(self, source: Source, folder: Path) -> Written:
        return dense_closeness(source, self.dtype, write_dense(source, folder, DTYPES[self.dtype], effective_weight))

    def load(self, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        return load_pretrained(folder, dtype)

    def commands(self, folder: str, source: Source) -> Mapping[str, str]:
        return {
            "transformers": "from transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{folder}")',
            "vLLM": f"vllm serve {folder}",
            "lm-eval": f"lm_eval run --model hf --model_args pretrained={folder} --tasks arc_easy",
        }


def dense_closeness(source: Source, dtype: str, is_exact: bool) -> Written:
    """What is to be expected of dequantized weights. is_exact: whether `dtype` holds them all."""
    if not is_exact:
        return Written("rounded", (f"Weights were rounded once more, to {dtype}.",))
    is_plain = all(unsupported_extras(spec) is None for spec in source.specs.values())
    return Written("exact" if is_plain else "reordered")


def write_dense(source: Source, folder: Path, dtype: torch.dtype, weight_of: Callable[[Linear], Tensor]) -> bool:
    """Write the model with the weights (O, I) that `weight_of` makes, in `dtype`. Returns whether it holds them all."""
    shards, is_exact = Shards(folder), True
    for linears, others in source.read():
        tensors = dict(others)
        for linear in linears:
            weight_OI = weight_of(linear)
            stored_OI = weight_OI.to(dtype)
            is_exact &= torch.equal(stored_OI.to(torch.float32), weight_OI)
            stored_OI = stored_OI.T if source.stores_transposed(linear.name) else stored_OI
            tensors |= {f"{linear.name}.weight": stored_OI, **linear.biases}
        shards.add(source.stack(tensors))
    shards.close()
    write_json(folder / CONFIG_FILE, {**source.config, "dtype": str(dtype).removeprefix("torch.")})
    source.copy_surroundings(folder)
    return is_exact


def effective_weight(linear: Linear) -> Tensor:
    """W (O, I) in float32 such that y = W x + b on the original's inputs x."""
    weight_OI = linear.weight_OI.dequantize()
    if linear.a_IR is not None and linear.b_RO is not None:
        weight_OI = weight_OI + (linear.a_IR @ linear.b_RO).T
    if linear.rotation is not None:
        # In double precision, by the two maps that a layer applies, which are defined for fine-tuned signs too.
        identity_II = torch.eye(weight_OI.shape[1], dtype=torch.float64)
        weight_OI = linear.rotation.output(linear.rotation.input(identity_II) @ weight_OI.double().T).T.float()
    if linear.spec.online is not None:
        identity_II = torch.eye(weight_OI.shape[1], dtype=torch.float64)
        weight_OI = (linear.spec.online(identity_II) @ weight_OI.double().T).T.float()
    return weight_OI.contiguous()
