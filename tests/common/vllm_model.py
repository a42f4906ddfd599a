"""A native export in vLLM's own model, on a CPU: python vllm_model.py FOLDER RANK RANKS STORE OUT

vLLM's configuration, model, weight loaders and linear layers run as they are, through the plug-in. What a CPU without
vLLM's compiled kernels cannot run is replaced: attention by torch's, fused operations by vLLM's own in torch. Writes
the logits (T, V) of fixed tokens. Run by tests where vLLM can be imported.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

TOKENS = torch.tensor([5, 9, 3, 40, 22, 17, 61, 8, 30, 12])


def attention(self, query: Tensor, key: Tensor, value: Tensor, output_shape: object = None) -> Tensor:
    """Of one sequence from its first token on: (T, heads * d) in, the same out."""
    tokens = len(query)
    q, k, v = (
        x.view(tokens, heads, -1).transpose(0, 1)
        for x, heads in ((query, self.num_heads), (key, self.num_kv_heads), (value, self.num_kv_heads))
    )
    y = scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)
    return y[0].transpose(0, 1).reshape(tokens, -1)


def main() -> None:
    folder, rank, ranks, store, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5])
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    # Before anything asks for it: without a GPU, vLLM's wheel for GPUs finds none.
    vllm.platforms._current_platform = CpuPlatform()
    from vllm.config import DeviceConfig, ModelConfig, ParallelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.custom_op import CustomOp
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.model_loader import get_model

    from lqer.serve.vllm import register

    register()
    register()
    Attention.forward = attention
    CustomOp.dispatch_forward = lambda self, *arguments, **options: self.forward_native
    torch.accelerator.empty_cache = lambda: None
    config = VllmConfig(
        model_config=ModelConfig(model=folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True),
        device_config=DeviceConfig("cpu"),
        parallel_config=ParallelConfig(tensor_parallel_size=ranks),
    )
    with set_current_vllm_config(config), torch.no_grad():
        init_distributed_environment(ranks, rank, f"file://{store}", rank, backend="gloo")
        initialize_model_parallel(ranks)
        model = get_model(vllm_config=config)
        logits_TV = model.compute_logits(model(TOKENS, torch.arange(len(TOKENS))))
    if rank == 0:
        save_file({"logits": logits_TV.contiguous()}, out)
    os._exit(0)


if __name__ == "__main__":
    main()
