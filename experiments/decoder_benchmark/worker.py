"""A process that holds the model of one scheme: it compiles a step, waits for its turn, and times it.

Steps are compiled by all workers at the same time, because that takes most of the time, and timed one after the other
while the other workers do nothing. A line on stdin tells the worker to compile the step of the next batch, a line of
JSON on stdout that it is ready, or why not, and another line on stdin to time it.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

from decoder_benchmark.models import build
from decoder_benchmark.step import Step

REPLAYS, REPETITIONS = 60, 7
PROFILED = 5


def run(
    scheme: str,
    batches: list[int],
    cache_tokens: int,
    compile_what: str,
    options: Mapping[str, Any],
    joined: bool,
    config: dict[str, Any],
) -> None:
    """options: of Inductor. joined: linears that read the same input run as one."""
    torch.set_grad_enabled(False)
    device = torch.device("cuda")
    started = time.monotonic()
    model = build(scheme, config, device, joined)
    torch.cuda.synchronize()
    built = time.monotonic() - started
    for batch in batches:
        if sys.stdin.readline().strip() != "compile":
            return
        started = time.monotonic()
        try:
            step = Step(model, batch, cache_tokens, compile_what, options)
            graph = step.graph()
        except Exception as error:  # reported in the table, as for every other row
            _say({"problem": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})
            raise
        _say({"built": built, "compiled": time.monotonic() - started})
        wants_profile = sys.stdin.readline().strip() == "profile"
        result = timed(step, graph)
        if wants_profile:
            result["kernels"] = profiled(step, graph)
        _say(result)
        step.close()
        del step, graph
        gc.collect()
        torch.cuda.empty_cache()


def timed(step: Step, graph: torch.cuda.CUDAGraph) -> dict[str, Any]:
    """Milliseconds of a step: the median of REPETITIONS means over REPLAYS replays, and their spread."""
    means = []
    for _ in range(REPETITIONS):
        step.rewind()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        means.append(start.elapsed_time(end) / REPLAYS)
    median = statistics.median(means)
    allocated = torch.cuda.memory_allocated() / 1e9
    return {"milliseconds": median, "spread": (max(means) - min(means)) / median, "gigabytes": allocated}


def profiled(step: Step, graph: torch.cuda.CUDAGraph) -> list[dict[str, Any]]:
    """Kernels of a step by name: how many, and their microseconds together, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    step.rewind()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(PROFILED):
            graph.replay()
        torch.cuda.synchronize()
    rows = [
        {"name": row.key, "count": row.count / PROFILED, "microseconds": row.self_device_time_total / PROFILED}
        for row in trace.key_averages()
    ]
    return sorted(rows, key=lambda row: -row["microseconds"])


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)
