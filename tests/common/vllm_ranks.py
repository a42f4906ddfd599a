"""Ranks of tensor parallelism, with the stand-in of vLLM: what the projections of a native export compute on each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import vllm_standin
from safetensors.torch import load_file, save_file
from torch import Tensor

from lqer.store.names import block_file

BLOCK = "model.layers.0"
TOKENS = 6


def build(folder: Path, plugin: Any) -> tuple[Any, dict[str, vllm_standin.LinearBase]]:
    """The plug-in's configuration of the folder, and the projections of a Llama's block by their names in vLLM."""
    described = json.loads((folder / "config.json").read_text())
    config = plugin.LqerVllmConfig.from_config(described["quantization_config"])
    config.packed_modules_mapping = vllm_standin.PACKED_MODULES
    config.maybe_update_config("", hf_config=type("Config", (), described)())
    hidden, inner, heads = (described[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    kv_heads, bias, head = described["num_key_value_heads"], described["attention_bias"], hidden // heads

    def named(name: str) -> dict[str, Any]:
        return {"quant_config": config, "prefix": f"{BLOCK}.{name}"}

    column, row, qkv = (getattr(vllm_standin, f"{kind}ParallelLinear") for kind in ("Column", "Row", "QKV"))
    return config, {
        "qkv": qkv(hidden, head, heads, kv_heads, bias, **named("self_attn.qkv_proj")),
        "o": row(heads * head, hidden, bias, **named("self_attn.o_proj")),
        "gate_up": column(hidden, 2 * inner, output_sizes=[inner, inner], **named("mlp.gate_up_proj")),
        "down": row(inner, hidden, **named("mlp.down_proj")),
    }


def outputs_of(folder: Path, rank: int, ranks: int, all_reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """What each projection computes on this rank of inputs that are the same for any number of ranks."""
    with vllm_standin.installed(rank, ranks, all_reduce):
        from lqer.serve import vllm as plugin

        config, layers = build(folder, plugin)
        weights = {name: tensor for file in ("guard.safetensors", block_file(0))
                   for name, tensor in load_file(folder / file).items()}  # fmt: skip
        lost = vllm_standin.load(layers.values(), weights.items(), config)
        assert not [name for name in lost if "norm" not in name], lost
        found = {}
        for place, (name, layer) in enumerate(layers.items()):
            is_row = isinstance(layer, vllm_standin.RowParallelLinear)
            width = {"qkv": 128, "gate_up": 128, "o": 128, "down": 256}[name]
            x = torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(place))
            with torch.no_grad():
                found[name] = layer(x.chunk(ranks, -1)[rank] if is_row else x).contiguous()
        return found


def run_rank(rank: int, ranks: int, folders: list[Path], store: Path, out: Path) -> None:
    """A process: `outputs_of` each folder, on gloo, into a file by the folder's place and the projection."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)

    def all_reduce(tensor: Tensor) -> Tensor:
        summed = tensor.clone()
        dist.all_reduce(summed)
        return summed

    found = {
        f"{place}.{name}": tensor
        for place, folder in enumerate(folders)
        for name, tensor in outputs_of(folder, rank, ranks, all_reduce).items()
    }
    save_file(found, out / f"{rank}.safetensors")
    dist.barrier()
