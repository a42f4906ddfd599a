"""Tokens a second of decoding, measured as CALDERA does (arXiv 2405.18886).

Batch 1, one token, no cache: forward calls of the whole model after warm-up, on a GPU as replays of one CUDA graph.
That is the cost of the weights, not a generation benchmark: attention over a context is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

CALLS = 500
WARM_UPS = 5
TOKEN = 17


@torch.no_grad()
def seconds_per_token(model: PreTrainedModel, calls: int = CALLS, graph: bool = True) -> float:
    """The mean over `calls` calls, wall clock, the device's work included.

    Raises RuntimeError where `graph` is asked for on a GPU and the model cannot be captured into a CUDA graph.
    """
    device = model.device
    ids_BT = torch.full((1, 1), TOKEN, device=device)

    def call() -> torch.Tensor:
        return model(ids_BT, use_cache=False).logits

    for _ in range(WARM_UPS):
        call()
    run: Callable[[], object] = call
    if graph and device.type == "cuda":
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        run = captured.replay
    return _seconds_of(run, calls, device) / calls


def _seconds_of(run: Callable[[], object], calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
