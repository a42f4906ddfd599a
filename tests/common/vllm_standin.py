"""A stand-in of what lqer.serve.vllm takes from vLLM, for tests on machines without it. It is not vLLM.

`installed(rank, ranks, all_reduce)` puts modules of vLLM's names into sys.modules. Signatures, the order of calls and
the splitting of sizes follow vLLM 0.33.0 (vllm/model_executor/layers/linear.py, .../models/utils.py); embeddings,
attention and schedulers have no counterpart.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

# Of Llama in vLLM: what a name becomes, and the place among the linears that are joined.
STACKED = {
    ".q_proj": (".qkv_proj", "q"), ".k_proj": (".qkv_proj", "k"), ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1),
}  # fmt: skip
PACKED_MODULES = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class LinearMethodBase:
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: Sequence[int], **rest: Any
    ) -> None:
        shape = (sum(output_partition_sizes), input_size_per_partition)
        layer.weight = nn.Parameter(torch.empty(shape), requires_grad=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.weight, bias)


@dataclass
class WeightsMapper:
    orig_to_new_regex: dict[re.Pattern[str], str | None] = field(default_factory=dict)

    def apply(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            renamed: str | None = name
            for pattern, new in self.orig_to_new_regex.items():
                if renamed is not None and pattern.search(renamed):
                    renamed = None if new is None else pattern.sub(new, renamed)
            if renamed is not None:
                yield renamed, tensor

    def apply_dict(self, values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for key, value in values.items() for name, _ in self.apply([(key, torch.empty(0))])}


class LinearBase(nn.Module):
    """A layer that holds `outputs` of its linears' outputs and `inputs` of their inputs."""

    ranks: tuple[int, int] = (0, 1)  # this one, of how many
    all_reduce: Callable[[Tensor], Tensor] = staticmethod(lambda tensor: tensor)

    def __init__(
        self, inputs: int, outputs: Sequence[int], sizes: tuple[int, int], bias: bool, dtype: torch.dtype,
        config: Any, prefix: str,
    ):  # fmt: skip
        super().__init__()
        self.prefix = prefix
        self.tp_rank, self.tp_size = self.ranks
        self.quant_method = config.get_quant_method(self, prefix=prefix)
        self.quant_method.create_weights(
            layer=self, input_size_per_partition=inputs, output_partition_sizes=list(outputs), input_size=sizes[0],
            output_size=sizes[1], params_dtype=dtype, weight_loader=None,
        )  # fmt: skip
        self.bias = nn.Parameter(torch.zeros(sum(outputs), dtype=dtype), requires_grad=False) if bias else None


class ColumnParallelLinear(LinearBase):
    def __init__(
        self, input_size: int, output_size: int, bias: bool = False, dtype: torch.dtype = torch.float32, *,
        output_sizes: Sequence[int] | None = None, quant_config: Any, prefix: str,
    ):  # fmt: skip
        sizes = output_sizes or [output_size]
        shares = [size // self.ranks[1] for size in sizes]
        super().__init__(input_size, shares, (input_size, sum(sizes)), bias, dtype, quant_config, prefix)

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_method.apply(self, x, self.bias)


class QKVParallelLinear(ColumnParallelLinear):
    """Ranks beyond the heads of keys and values hold those of their neighbours."""

    def __init__(
        self, hidden: int, head: int, heads: int, kv_heads: int, bias: bool = False,
        dtype: torch.dtype = torch.float32, *, quant_config: Any, prefix: str,
    ):  # fmt: skip
        ranks = self.ranks[1]
        kv = max(1, kv_heads // ranks) * head * ranks
        super().__init__(
            hidden, heads * head + 2 * kv, bias, dtype, output_sizes=[heads * head, kv, kv],
            quant_config=quant_config, prefix=prefix,
        )  # fmt: skip


class RowParallelLinear(LinearBase):
    def __init__(
        self, input_size: int, output_size: int, bias: bool = False, dtype: torch.dtype = torch.float32, *,
        quant_config: Any, prefix: str,
    ):  # fmt: skip
        share = input_size // self.ranks[1]
        super().__init__(share, [output_size], (input_size, output_size), bias, dtype, quant_config, prefix)

    def forward(self, x: Tensor) -> Tensor:
        y = self.quant_method.apply(self, x, None if self.tp_rank else self.bias)
        return self.all_reduce(y) if self.tp_size > 1 else y


def load(layers: Iterable[LinearBase], weights: Iterable[tuple[str, Tensor]], config: Any) -> list[str]:
    """Hand the tensors of a checkpoint to the layers as AutoWeightsLoader does; returns names that found no place."""
    by_prefix = {layer.prefix: layer for layer in layers}
    lost = []
    for name, tensor in config.get_checkpoint_weight_mapper().apply(weights):
        place: str | int | None = None
        for stored, (joined, shard) in STACKED.items():
            if stored in name:
                name, place = name.replace(stored, joined, 1), shard
        prefix, _, parameter = name.rpartition(".")
        if prefix not in by_prefix or not hasattr(by_prefix[prefix], parameter):
            lost.append(name)
            continue
        found = getattr(by_prefix[prefix], parameter)
        found.weight_loader(found, tensor, *([] if place is None else [place]))
    for layer in by_prefix.values():
        if hasattr(layer.quant_method, "process_weights_after_loading"):
            layer.quant_method.process_weights_after_loading(layer)
    return lost


@contextmanager
def installed(
    rank: int = 0, ranks: int = 1, all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Iterator[dict[str, type]]:
    """Modules of vLLM's names, as rank `rank` of `ranks`; yields the configurations by the names they register with."""
    registered: dict[str, type] = {}

    def register_quantization_config(name: str) -> Callable[[type], type]:
        return lambda config: registered.setdefault(name, config)

    contents = {
        "distributed": {"tensor_model_parallel_all_reduce": all_reduce},
        "model_executor.layers.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        "model_executor.layers.quantization": {"register_quantization_config": register_quantization_config},
        "model_executor.layers.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        "model_executor.models.utils": {"WeightsMapper": WeightsMapper},
    }
    names = {"lqer.serve.vllm", "vllm", *(f"vllm.{name}" for name in contents)}
    names |= {"vllm.model_executor", "vllm.model_executor.layers", "vllm.model_executor.models"}
    before = {name: sys.modules.pop(name, None) for name in names}
    for name in names - {"lqer.serve.vllm"}:
        sys.modules[name] = ModuleType(name)
    for name, members in contents.items():
        vars(sys.modules[f"vllm.{name}"]).update(members)
    ranks_before, LinearBase.ranks = LinearBase.ranks, (rank, ranks)
    reduce_before, LinearBase.all_reduce = LinearBase.all_reduce, staticmethod(all_reduce)
    try:
        yield registered
    finally:
        LinearBase.ranks, LinearBase.all_reduce = ranks_before, staticmethod(reduce_before)
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
