"""The plug-in of vLLM: it serves what `lqer export CHECKPOINT native OUT` writes.

    pip install lqer vllm && vllm serve OUT

vLLM finds `register` by the entry point "vllm.general_plugins" and calls it in each of its processes. Written against
vLLM 0.33.0; no other file imports vLLM.

A parameter of a linear is empty: its weight loader keeps the tensors that vLLM hands over until those of one linear are
complete, and then what this rank needs of them (shards.py). Kernels run on packed weights where they can, else torch on
dequantized ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper

from lqer.checkpoint.pack import FORMAT_VERSION
from lqer.checkpoint.quantizer import QUANT_METHOD, guard
from lqer.errors import ModelError
from lqer.models.structure import ONLINE_ROTATIONS
from lqer.serve.layer import LayerShard
from lqer.serve.stored import FLAT_NAMES, StoredLinear
from lqer.transforms.hadamard import hadamard
from lqer.transforms.quarot import OnlineRotation

# vLLM's names of the parts of a fused attention projection.
QKV = {"q": 0, "k": 1, "v": 2}


def register() -> None:
    """Tell vLLM of quant_method "lqer"; it may be called again."""
    register_quantization_config(QUANT_METHOD)(LqerVllmConfig)


class LqerVllmConfig(QuantizationConfig):
    """quantization_config of config.json, as `native_config` makes it.

    entries: what each quantized linear is, by its name in the checkpoint, as in lqer.json.
    """

    def __init__(self, entries: Mapping[str, Mapping[str, Any]]):
        super().__init__()
        self.entries = dict(entries)
        self.rotations: dict[str, OnlineRotation] = {}
        self._guard = next(iter(guard(entries)))

    @classmethod
    def get_name(cls) -> Any:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LqerVllmConfig:
        if "schemes" not in config:
            raise ModelError(
                'a checkpoint for lqer.load_quantized; vLLM loads what "lqer export CHECKPOINT native OUT" makes of it'
            )
        if (version := config.get("format_version")) != FORMAT_VERSION:
            raise ModelError(f"config.json: format_version {version} is not supported, only {FORMAT_VERSION}")
        if config.get("attention") is not None:
            raise ModelError("vLLM's attention cannot round its operands: export the checkpoint of a run without that")
        return cls({name: config["schemes"][place] for name, place in config["linears"].items()})

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        rotated = getattr(hf_config, ONLINE_ROTATIONS, None) or {}
        self.rotations = {name: OnlineRotation(hadamard, heads) for name, heads in rotated.items()}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.entries = hf_to_vllm_mapper.apply_dict(self.entries)
        self.rotations = hf_to_vllm_mapper.apply_dict(self.rotations)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        pattern, flat = FLAT_NAMES
        return WeightsMapper(
            orig_to_new_regex={re.compile(rf"^{re.escape(self._guard)}$"): None, re.compile(pattern): flat}
        )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        if not isinstance(layer, LinearBase):
            if inside := [name for name in self.entries if name.startswith(f"{prefix}.")]:
                raise ModelError(f"{inside[0]}: vLLM runs it within {type(layer).__name__}, which is not supported")
            return None
        around, _, last = prefix.rpartition(".")
        parts = [f"{around}.{part}" if around else part for part in self.packed_modules_mapping.get(last, [last])]
        quantized = [part for part in parts if part in self.entries]
        if not quantized:
            return UnquantizedLinearMethod()
        if len(quantized) < len(parts):
            other = next(part for part in parts if part not in self.entries)
            raise ModelError(f"vLLM joins {quantized[0]}, which is quantized, with {other}, which is not")
        rotation = self.rotations.get(prefix)
        return LqerLinearMethod([StoredLinear(part, self.entries[part]) for part in parts], rotation)


class LqerLinearMethod(LinearMethodBase):
    """Loads and runs one layer of vLLM: the linears that it joins, in their order."""

    def __init__(self, linears: Sequence[StoredLinear], rotation: OnlineRotation | None):
        self.linears, self.rotation = linears, rotation
        self.shard: LayerShard | None = None

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        shard = LayerShard(
            self.linears, input_size_per_partition, output_partition_sizes, layer.tp_rank, layer.tp_size, params_dtype,
            tensor_model_parallel_all_reduce,
        )  # fmt: skip
        if self.rotation is not None and shard.splits_inputs:
            raise ModelError(f"{self.linears[0].name}: its input is rotated as a whole at run time: run it on one rank")
        self.shard = shard
        for part, dtype in shard.dtypes.items():
            parameter: Any = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = partial(_load, shard, part)
            layer.register_parameter(part.replace(".", "_"), parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        assert self.shard is not None
        layer.lqer_linear, bias_O = self.shard.finish()
        for part in self.shard.dtypes:
            delattr(layer, part.replace(".", "_"))
        self.shard = None
        if bias_O is not None:
            if layer.bias is None:
                raise ModelError(f"{self.linears[0].name} has a bias, and vLLM's layer has none")
            layer.bias.data.copy_(bias_O)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = layer.lqer_linear(x if self.rotation is None else self.rotation(x))
        return y if bias is None else y + bias


def _load(
    shard: LayerShard,
    part: str,
    parameter: nn.Parameter,
    tensor: Tensor,
    place: str | int | tuple[int, ...] | None = None,
) -> None:
    """A weight loader as vLLM calls it. place: which of the layer's linears, if it joins several."""
    if isinstance(place, tuple):
        raise ModelError(f"{shard.linears[0].name}: vLLM takes the tensor for several linears at once")
    shard.add(QKV[place] if isinstance(place, str) else place or 0, part, tensor, parameter.device)
