"""Random checkpoints of mixtures of experts as they are published: experts one by one in FP8, or stacked in MXFP4.

Shapes: E experts, O out_features, I in_features, G groups of a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

BLOCK = 128
MXFP4_GROUP = 32
# Exponents of scales of MXFP4, from which weights are of the size of trained ones.
MXFP4_SCALES = (116, 122)
WEIGHT_SIZE = 0.02
BYTES_PER_FILE = 2_000_000_000
QUANTIZATION = {
    "deepseek_v3": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                    "weight_block_size": [BLOCK, BLOCK]},
    "gpt_oss": {"quant_method": "mxfp4"},
}  # fmt: skip
DEEPSEEK = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
# By name: the architecture, and where it differs from its configuration's default; bits of a stored value of an expert
# and of another linear, with scales.
SHAPES: dict[str, tuple[str, dict[str, Any], tuple[float, float]]] = {
    "deepseek-v3": ("deepseek_v3", DEEPSEEK, (8 + 32 / 128**2, 8 + 32 / 128**2)),
    "kimi-k2": (
        "deepseek_v3",
        {**DEEPSEEK, "n_routed_experts": 384, "n_group": 1, "topk_group": 1, "num_attention_heads": 64,
         "num_key_value_heads": 64, "vocab_size": 163840},
        (8 + 32 / 128**2, 8 + 32 / 128**2),
    ),
    "deepseek-v4-flash": (
        "deepseek_v4",
        {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "compressed_sparse_attention"],
         "mlp_layer_types": ["hash_moe", "moe"]},
        (4 + 8 / 32, 8 + 8 / 128**2),
    ),
    "gpt-oss-120b": ("gpt_oss", {"num_hidden_layers": 2, "num_local_experts": 128}, (4 + 8 / 32, 16)),
    "tiny": (
        "mixtral",
        {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
         "num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 256},
        (8, 16),
    ),
}  # fmt: skip


def write_mixture(
    folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> int:
    """Write a model of random weights, made on the device, and a tokenizer. Returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    places: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    total = 0

    def write() -> None:
        file = f"model-{len(set(places.values())):05d}.safetensors"
        save_file(held, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(held, file))
        held.clear()

    for name, tensor in _tensors(config, device):
        held[name] = tensor.cpu()
        total += tensor.nbytes
        if sum(one.nbytes for one in held.values()) > BYTES_PER_FILE:
            write()
    write()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored |= {"quantization_config": QUANTIZATION[config.model_type], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(stored), encoding="utf-8")
    tokenizer.save_pretrained(folder)
    return total


def _tensors(config: PreTrainedConfig, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.state_dict().items():
        shape, is_stack = tuple(parameter.shape), ".experts." in name and parameter.ndim == 3
        if is_stack and config.model_type == "gpt_oss":
            yield from _mxfp4(name, shape, device)
        elif is_stack:
            yield from _experts(name, shape, device)
        elif name.endswith("_proj.weight") or name.endswith(("_proj_with_mqa.weight", "_a_proj.weight")):
            yield from _fp8(name, shape, device) if config.model_type == "deepseek_v3" else _plain(name, shape, device)
        else:
            yield from _plain(name, shape, device)


def _plain(name: str, shape: tuple[int, ...], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    if name.endswith("norm.weight"):
        yield name, torch.ones(shape, dtype=torch.bfloat16, device=device)
    else:
        size = 0 if name.endswith("bias") else WEIGHT_SIZE
        yield name, size * torch.randn(shape, dtype=torch.bfloat16, device=device)


def _fp8(name: str, shape: tuple[int, ...], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    yield name, torch.randn(shape, dtype=torch.bfloat16, device=device).to(torch.float8_e4m3fn)
    grid = [-(-size // BLOCK) for size in shape]
    yield f"{name}_scale_inv", torch.full(grid, WEIGHT_SIZE, device=device)


def _experts(name: str, shape: tuple[int, ...], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Those of a stack (E, O, I), of gate and up (E, 2 O, I)."""
    layer, _, stack = name.rpartition(".")
    linears = ("gate_proj", "up_proj") if stack == "gate_up_proj" else (stack,)
    for expert in range(shape[0]):
        for linear in linears:
            yield from _fp8(f"{layer}.{expert}.{linear}.weight", (shape[1] // len(linears), shape[2]), device)


def _mxfp4(name: str, shape: tuple[int, ...], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Of a stack (E, I, O): codes (E, O, G, 16), scales (E, O, G)."""
    experts, columns, rows = shape
    groups = (experts, rows, columns // MXFP4_GROUP)
    yield f"{name}_blocks", torch.randint(256, (*groups, MXFP4_GROUP // 2), dtype=torch.uint8, device=device)
    yield f"{name}_scales", torch.randint(*MXFP4_SCALES, groups, dtype=torch.uint8, device=device)
