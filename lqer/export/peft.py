"""Low-rank factors as a LoRA adapter for PEFT and vLLM, over a base of the quantized weights without them.

    OUT/adapter_model.safetensors   base_model.model.<linear>.lora_A.weight [R, I] = Aᵀ, .lora_B.weight [O, R] = Bᵀ
    OUT/base                        the weights, in compressed-tensors' layout, dense or in bitsandbytes' NF4

The adapter's scale is 1 for every rank. Over NF4 it is where LoftQ and QERA let the training of QLoRA start. Over a
dense base the factors of a rotated linear are brought into the original's basis, A' = Vᵀ A and B' = B U.

Shapes: I in_features, O out_features, R rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lqer.components import require_choice
from lqer.export.base import Target, Written, first_missing, load_pretrained, unsupported_basis, unsupported_transposed
from lqer.export.compressed_tensors import unsupported_weight, write_packed
from lqer.export.config_groups import is_float, unsupported_in_transformers, unsupported_together
from lqer.export.dense import effective_weight, write_dense
from lqer.export.nf4 import unsupported_nf4, write_nf4
from lqer.export.packed_readers import is_served
from lqer.export.shards import write_tensors
from lqer.export.source import Linear, LinearSpec, Outline, Source
from lqer.store.files import write_json

BASE_FOLDER = "base"
# What reads each kind of base, besides transformers and PEFT.
BASE_READERS = {"compressed-tensors": ("compressed_tensors",), "dense": (), "nf4": ("bitsandbytes",)}
# What vLLM accepts as the largest rank.
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Peft(Target):
    """A LoRA adapter of the low-rank factors over the quantized weights. base: the layout of those."""

    kind = "peft"
    readers = ("transformers", "peft")
    library_name = "peft"
    tags = ("lora",)

    base: Literal["compressed-tensors", "dense", "nf4"] = "compressed-tensors"

    def __post_init__(self) -> None:
        require_choice("base", self.base, list(BASE_READERS), self.kind)

    def unsupported(self, spec: LinearSpec) -> str | None:
        if self.base == "dense":
            return None
        return unsupported_basis(spec) or (unsupported_nf4 if self.base == "nf4" else unsupported_weight)(spec)

    def unsupported_model(self, model: Outline) -> tuple[str, str] | None:
        if not any(spec.rank for spec in model.specs.values()):
            return next(iter(model.specs)), "neither it nor any other linear has low-rank factors"
        if self.base != "compressed-tensors":
            return unsupported_transposed(model)
        return unsupported_transposed(model) or unsupported_in_transformers(model) or unsupported_together(model)

    @property
    def most_bits(self) -> float:
        return 32.0 if self.base == "dense" else super().most_bits

    def missing_reader(self) -> str | None:
        return first_missing((*self.readers, *BASE_READERS[self.base]))

    def write(self, source: Source, folder: Path) -> Written:
        (folder / BASE_FOLDER).mkdir()
        if self.base == "dense":
            write_dense(source, folder / BASE_FOLDER, torch.float32, _base_weight)
        elif self.base == "nf4":
            write_nf4(source, folder / BASE_FOLDER)
        else:
            write_packed(source, folder / BASE_FOLDER)
        adapter = {
            f"base_model.model.{linear.name}.{part}.weight": tensor
            for linears, _ in source.read()
            for linear in linears
            for part, tensor in lora_factors(linear).items()
        }
        write_tensors(folder / "adapter_model.safetensors", adapter)
        write_json(folder / "adapter_config.json", adapter_config(source.specs))
        source.copy_surroundings(folder)
        return Written("reordered", (f"The weights without the factors are in the folder {BASE_FOLDER}.",))

    def load(self, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        from peft import PeftModel

        if self.base == "nf4":
            # Dequantized by bitsandbytes itself, whose kernels for a CPU multiply in less than float32.
            base = load_pretrained(folder / BASE_FOLDER, dtype, device_map={"": "cpu"}).dequantize()
        else:
            base = load_pretrained(folder / BASE_FOLDER, dtype)
        # compressed-tensors unpacks weights in the first call, and PEFT looks for them. MX floats become bfloat16,
        # which holds them; in float32 the order of sums is then all that differs.
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            base(input_ids=torch.zeros(1, 1, dtype=torch.int64))
            nn.Module.to(base, dtype)
        # It is called as the model that it wraps.
        return cast(PreTrainedModel, PeftModel.from_pretrained(base, folder).eval())

    def commands(self, folder: str, source: Source) -> Mapping[str, str]:
        is_packed_float = self.base == "compressed-tensors" and any(map(is_float, source.specs.values()))
        dtype = ", dtype=torch.bfloat16" if is_packed_float else ""
        base = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{folder}/{BASE_FOLDER}"{dtype})\n'
        )
        if self.base == "nf4":
            return {"QLoRA": f'{base}model = PeftModel.from_pretrained(model, "{folder}", is_trainable=True)'}
        largest = max(spec.rank for spec in source.specs.values())
        served = next((rank for rank in SERVED_RANKS if rank >= largest), largest)
        unpacking = (
            "model(input_ids=torch.tensor([[0]]))   # compressed-tensors unpacks its weights in the first call\n"
        )
        loaded = {"PEFT": f'import torch\n{base}{unpacking}model = PeftModel.from_pretrained(model, "{folder}")'}
        if self.base == "compressed-tensors" and not is_served(source):
            return loaded
        options = f"--enable-lora --max-lora-rank {served} --lora-modules lqer={folder}"
        return loaded | {"vLLM": f"vllm serve {folder}/{BASE_FOLDER} {options}"}


def _base_weight(linear: Linear) -> Tensor:
    return effective_weight(replace(linear, a_IR=None, b_RO=None))


def lora_factors(linear: Linear) -> dict[str, Tensor]:
    """lora_A float32 (R, I) and lora_B (O, R) of a linear, in the basis of its inputs; nothing without factors."""
    a_IR, b_RO = linear.a_IR, linear.b_RO
    if a_IR is None or b_RO is None:
        return {}
    identity_II = torch.eye(len(a_IR), dtype=torch.float64)
    if linear.rotation is not None:
        a_IR = (linear.rotation.input(identity_II) @ a_IR.double()).float()
        b_RO = linear.rotation.output(b_RO.double()).float()
    if linear.spec.online is not None:
        a_IR = (linear.spec.online(identity_II) @ a_IR.double()).float()
    return {"lora_A": a_IR.T.contiguous(), "lora_B": b_RO.T.contiguous()}


def adapter_config(specs: Mapping[str, LinearSpec]) -> dict[str, Any]:
    """adapter_config.json: one rank for most linears, and the others' by name."""
    ranks = {name: spec.rank for name, spec in specs.items() if spec.rank}
    commonest = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != commonest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE_FOLDER,
        "r": commonest,
        "lora_alpha": commonest,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
    }
