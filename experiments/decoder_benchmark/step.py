"""One decoding step as a CUDA graph: blocks compiled once for all, or the model as a whole.

`blocks` compiles the forward function of a decoder block, once for all 32, so that it takes seconds: a block is called
with a cache of one layer and layer number 0, or else it would be compiled anew for each number. The addition after its
MLP is then a kernel of its own, where compiling the `model`, as `generate` does, fuses it with the next norm.

Shapes: B sequences, T tokens, S tokens of the cache, H heads (broadcast).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

TOKEN = 17
WARM_UPS = 3


class Step:
    """A step of `batch` sequences, one token each, that attend to a whole static cache of `cache_tokens`."""

    def __init__(self, model: Any, batch: int, cache_tokens: int, compile_what: str, options: Mapping[str, Any]):
        """options: of Inductor."""
        self.model, self.batch, device = model, batch, next(model.parameters()).device
        self._ids_BT = torch.full((batch, 1), TOKEN, device=device)
        self._mask_BHTS = torch.ones(batch, 1, 1, cache_tokens, dtype=torch.bool, device=device)
        torch.compiler.reset()
        whole = compile_what == "model"
        layers = len(model.model.layers)
        self.caches = [_cache(model, layers if whole else 1, cache_tokens) for _ in range(1 if whole else layers)]
        self._plain = [block.forward for block in model.model.layers]
        self._call: Callable[..., Any] = model.forward
        if whole:
            self._initialize(model.forward)
            self._call = torch.compile(model.forward, fullgraph=True, dynamic=False, options=dict(options))
        else:
            self._compile_blocks(dict(options))

    def _compile_blocks(self, options: dict[str, Any]) -> None:
        blocks = self.model.model.layers
        compiled = torch.compile(type(blocks[0]).forward, fullgraph=True, dynamic=False, options=options)
        for module in blocks.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = 0
        for run in (type(blocks[0]).forward, compiled):
            for block, cache in zip(blocks, self.caches, strict=True):
                block.forward = _with_cache(run, block, cache)
            if run is not compiled:
                self._initialize(self._call)

    def _initialize(self, call: Callable[..., Any]) -> None:
        """Allocate the caches in a plain call; then they are tensors like others to the compiler."""
        self.run(call)
        for cache in self.caches:
            for layer in cache.layers:
                for tensor in vars(layer).values():
                    if isinstance(tensor, Tensor) and len(self.caches) > 1:
                        # A mark of a fixed address, which would have each block compiled anew.
                        vars(tensor).pop("_dynamo_static_input_type", None)

    def run(self, call: Callable[..., Any] | None = None) -> Tensor:
        """The logits (B, 1, V)."""
        return (call or self._call)(
            input_ids=self._ids_BT, attention_mask=self._mask_BHTS, past_key_values=self.caches[0], use_cache=True
        ).logits

    def rewind(self) -> None:
        """Forget the tokens of the cache: every step writes one."""
        for cache in self.caches:
            for layer in cache.layers:
                layer.cumulative_length.zero_()

    def graph(self) -> torch.cuda.CUDAGraph:
        """The compiled step, recorded. Raises ValueError where logits are not finite."""
        for _ in range(WARM_UPS):
            logits_BTV = self.run()
        if not torch.isfinite(logits_BTV).all():
            raise ValueError("logits are not finite")
        self.rewind()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        return graph

    def close(self) -> None:
        """Free the caches and let blocks run as they did."""
        for block, plain in zip(self.model.model.layers, self._plain, strict=True):
            block.forward = plain
        self.caches.clear()


def _with_cache(run: Callable[..., Any], block: Any, cache: Any) -> Callable[..., Any]:
    from transformers.cache_utils import Cache

    def forward(*arguments: Any, **named: Any) -> Any:
        return run(block, *arguments, **{k: cache if isinstance(v, Cache) else v for k, v in named.items()})

    return forward


def _cache(model: Any, layers: int, tokens: int) -> Any:
    from transformers import StaticCache

    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": layers})
    return StaticCache(config=config, max_cache_len=tokens)
