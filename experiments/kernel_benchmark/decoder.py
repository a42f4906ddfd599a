"""A compiled decoder of Llama-7B's shape with random weights, one token at a time in a CUDA graph: bf16, then packed.

The model is built in bf16 on the GPU and timed. Then every linear of its blocks is replaced by packed weights with a
random low-rank branch, and the same graph is captured and timed again. W4A8 rounds the model's own weights; lattice
codes are random, which takes the same time and needs no search. The embeddings and the output layer stay bf16. The
allocated memory shows that there is no dequantized copy of a weight.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernel_benchmark import timing
from kernel_benchmark.contenders import FACTOR, W4, X8, random_rotation
from kernel_benchmark.results import Bar, BarResult, compare
from lqer.formats import E8P, QuantizedTensor

CONFIG = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
}
RANK, LATTICE_RANK = 32, 64
CACHE_TOKENS = 512  # every token attends to a cache of this length; a run decodes fewer
WARM_UPS = 3
DEVICE = torch.device("cuda")
AGAINST = "the same model in bf16"
REPETITIONS = 2
ACTIVATION_BYTES = 64 << 20  # logits, attention scores, kernels' workspaces


@dataclass(frozen=True)
class Decoding:
    """One model; bytes as requested from torch's allocator, which rounds up."""

    label: str
    milliseconds: float
    spread: float
    tokens_per_second: float
    allocated_bytes: int
    peak_bytes: int  # while decoding, the model resident
    packed_bytes: int  # of all packed linears together
    unexplained_bytes: int  # allocated, but not for packed weights, parameters, buffers or the cache
    copies_of_weights: bool  # whether a dequantized weight would fit in the unexplained or peak bytes


class PackedModule(nn.Module):
    """A packed linear in a model."""

    def __init__(self, packed: Any):
        super().__init__()
        # In a tuple, so that its tensors are not counted as parameters and buffers.
        self.packed = (packed,)

    def forward(self, x: Tensor) -> Tensor:
        from lqer.kernels import packed_linear

        return packed_linear(x, self.packed[0])


def run_decoder(budget_ms: float, bar: Bar, config: dict[str, Any] | None = None) -> tuple[list[Decoding], BarResult]:
    """bf16, W4A8 and lattice codes, and the result of W4A8 against bf16."""
    model = build(config or CONFIG)
    largest = max(linear.weight.numel() * 2 for _, _, linear in block_linears(model))
    dense = _decode("bf16", model, 0, largest, budget_ms)
    packed = {}
    for label, pack in PACKINGS.items():
        model = build(config or CONFIG)
        packed[label] = _decode(label, model, pack_in_place(model, pack), largest, budget_ms)
    result = compare(bar, [packed[W4A8].milliseconds * 1000], [dense.milliseconds * 1000], AGAINST)
    return [dense, *packed.values()], result


def build(config: dict[str, Any]) -> nn.Module:
    """A LlamaForCausalLM with random weights, made on the GPU in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with DEVICE:
            return LlamaForCausalLM(LlamaConfig(**config)).eval()
    finally:
        torch.set_default_dtype(previous)


def block_linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, linear) of every linear in the decoder blocks."""
    found = []
    for block in model.model.layers:  # type: ignore[union-attr]
        for parent in block.modules():
            found += [(parent, name, child) for name, child in parent.named_children() if isinstance(child, nn.Linear)]
    return found


def compile_parts(model: nn.Module) -> None:
    """Fuse the operations between the linears, in all models alike: norms, activations, rotary embeddings.

    Parts of blocks, because a block has its index as attribute: each of 32 would be compiled anew.
    """
    from transformers.models.llama import modeling_llama

    torch.compiler.reset()
    rotate = getattr(modeling_llama.apply_rotary_pos_emb, "__wrapped__", modeling_llama.apply_rotary_pos_emb)
    modeling_llama.apply_rotary_pos_emb = torch.compile(rotate, fullgraph=True, dynamic=False)
    for block in model.model.layers:  # type: ignore[union-attr]
        for part in (block.input_layernorm, block.post_attention_layernorm, block.mlp):
            part.compile(fullgraph=True, dynamic=False)


def pack_in_place(model: nn.Module, pack: Callable[[Tensor], Any]) -> int:
    """Replace every linear of the blocks by packed weights and a random branch; returns their bytes."""
    total = 0
    for parent, name, linear in block_linears(model):
        packed = pack(linear.weight.detach())
        setattr(parent, name, PackedModule(packed))
        total += packed.nbytes
    return total


def _pack_w4a8(weight_OI: Tensor) -> Any:
    from lqer.kernels import PackedLinear

    return PackedLinear.pack(W4.quantize(weight_OI), *_random_branch(weight_OI, RANK), None, X8, dtype=torch.bfloat16)


def _pack_lattice(weight_OI: Tensor) -> Any:
    from lqer.kernels import PackedLinear

    outputs, inputs = weight_OI.shape
    lattice, device = E8P(2), weight_OI.device
    codes = torch.randint(0, 2**16, (outputs, inputs // lattice.vector_size), device=device)
    weight = QuantizedTensor(
        lattice, (outputs, inputs), 1, {"codes": codes, "scales": weight_OI.float().std().view(1, 1)}
    )
    factors, hadamard = _random_branch(weight_OI, LATTICE_RANK), random_rotation(outputs, inputs, device)
    return PackedLinear.pack(weight, *factors, None, None, torch.bfloat16, hadamard)


def _random_branch(weight_OI: Tensor, rank: int) -> tuple[QuantizedTensor, QuantizedTensor]:
    outputs, inputs = weight_OI.shape
    a_IR = torch.randn(inputs, rank, device=weight_OI.device) * inputs**-0.5
    b_RO = torch.randn(rank, outputs, device=weight_OI.device) * weight_OI.std().float()
    return FACTOR.quantize(a_IR, axis=0), FACTOR.quantize(b_RO, axis=0)


W4A8 = f"W4A8 + rank {RANK}"
PACKINGS = {W4A8: _pack_w4a8, f"2-bit E8P + rank {LATTICE_RANK}, rotated": _pack_lattice}


def _decode(label: str, model: nn.Module, packed_bytes: int, largest: int, budget_ms: float) -> Decoding:
    from transformers import StaticCache

    gc.collect()
    torch.cuda.empty_cache()
    cache: Any = StaticCache(config=model.config, max_cache_len=CACHE_TOKENS)  # type: ignore[arg-type]
    token_BT = torch.full((1, 1), 17, device=DEVICE)
    mask_BHTS = torch.ones(1, 1, 1, CACHE_TOKENS, dtype=torch.bool, device=DEVICE)
    compile_parts(model)

    def step() -> Tensor:
        return model(input_ids=token_BT, attention_mask=mask_BHTS, past_key_values=cache, use_cache=True).logits

    for _ in range(WARM_UPS):
        logits = step()
    if not torch.isfinite(logits).all():
        raise ValueError(f"the logits of the {label} decoder are not finite")
    del logits
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    graph = timing.graph_of([step], 1)
    # Every replay writes one token into the cache, so fewer samples than its length.
    budget_ms = min(budget_ms, CACHE_TOKENS / 8 * _milliseconds_once(graph))
    times = [timing.median_us(graph.replay, budget_ms) / 1000 for _ in range(REPETITIONS)]
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    mean = sum(times) / REPETITIONS
    known = packed_bytes + _tensor_bytes([*model.parameters(), *model.buffers()])
    known += _tensor_bytes(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    unexplained = allocated - known
    return Decoding(
        label,
        mean,
        (max(times) - min(times)) / mean,
        1000 / mean,
        allocated,
        peak,
        packed_bytes,
        unexplained,
        unexplained > largest or peak - allocated > largest + ACTIVATION_BYTES,
    )


def _milliseconds_once(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _tensor_bytes(tensors: Any) -> int:
    seen = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(seen.values())
