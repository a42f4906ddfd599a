"""Times on the GPU: medians over replays of a CUDA graph or over calls from Python; the rates of the lower bounds.

A graph uses every copy of the weights `rounds` times, so that it is long compared with the gap between two replays; the
time of a call is the time of the graph divided by its number of calls.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FEWEST_SAMPLES, MOST_SAMPLES = 7, 300
# The launch of a replay takes a few microseconds, 1 % of this.
SHORTEST_GRAPH_US = 500.0
MOST_ROUNDS = 64
COPY_BYTES = 2 << 30
MATMUL_SIZE = 8192
RATE_BUDGET_MS = 200.0

Call = Callable[[], Tensor]


def rounds_for(calls: int, microseconds: float) -> int:
    """How often a graph must repeat `calls` calls of at least `microseconds` each to be SHORTEST_GRAPH_US long."""
    return max(1, min(MOST_ROUNDS, math.ceil(SHORTEST_GRAPH_US / (calls * microseconds))))


def graph_of(calls: Sequence[Call], rounds: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of all calls, `rounds` times; every call must have run before, so that nothing is compiled here."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


def loop_of(calls: Sequence[Call], rounds: int) -> Callable[[], None]:
    """The same as `graph_of(...).replay`, from Python."""

    def run() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    return run


def median_us(run: Callable[[], object], budget_ms: float) -> float:
    """Median duration of `run` in microseconds, between CUDA events; 7 to 300 samples within the budget."""
    run()
    first = durations_us(run, 1)[0]
    count = int(budget_ms * 1000 / first)
    return statistics.median(durations_us(run, max(FEWEST_SAMPLES, min(MOST_SAMPLES, count))))


def durations_us(run: Callable[[], object], count: int) -> list[float]:
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in pairs:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1000 for start, end in pairs]


def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy; read and written bytes both count."""
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (median_us(lambda: target.copy_(source), RATE_BUDGET_MS) * 1e-6)


def matmul_rate() -> float:
    """Operations per second of a square bf16 product of random values; a multiply-add counts as two."""
    left = torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device="cuda")
    right = torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device="cuda")
    return 2 * MATMUL_SIZE**3 / (median_us(lambda: left @ right, RATE_BUDGET_MS) * 1e-6)
