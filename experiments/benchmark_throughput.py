"""Tokens a second of a quantized checkpoint beside its original.

    python experiments/benchmark_throughput.py CHECKPOINT [--original MODEL] [--backends emulate triton]
        [--dtype bfloat16] [--calls 500] [--no-graph] [--json FILE]

As lqer/evaluation/decode_speed.py measures it: batch 1, one token, no cache. CHECKPOINT is a run's `checkpoint` folder;
MODEL anything that a config's `model` may be.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lqer.checkpoint.load import load_quantized
from lqer.errors import LqerError
from lqer.evaluation.decode_speed import CALLS, seconds_per_token
from lqer.models.source import load_model, pick_device, resolve_model
from lqer.report.environment import device_name


@dataclass(frozen=True)
class Throughput:
    """One model: milliseconds of a forward call of one token, and what its tensors take."""

    model: str
    backend: str
    milliseconds: float
    tokens_per_second: float
    bytes: int


def measure(label: str, backend: str, model: PreTrainedModel, calls: int, graph: bool) -> Throughput:
    """Raises RuntimeError where the model cannot be captured into a CUDA graph."""
    seconds = seconds_per_token(model, calls, graph)
    tensors = {t.data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    return Throughput(label, backend, 1000 * seconds, 1 / seconds, sum(tensors.values()))


def table(rows: Sequence[Throughput]) -> str:
    lines = ["| model | backend | ms per token | tokens/s | MB of tensors |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row.model} | {row.backend} | {row.milliseconds:.3f} | {row.tokens_per_second:.1f} | "
            f"{row.bytes / 1e6:.1f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--original")
    parser.add_argument("--backends", nargs="+", default=["emulate"], choices=["emulate", "triton"])
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--no-graph", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = pick_device("auto")
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    loads: list[tuple[str, str, Callable[[], PreTrainedModel]]] = [
        ("quantized", backend, partial(load_quantized, arguments.checkpoint, device, dtype, backend))
        for backend in arguments.backends
    ]
    if arguments.original is not None:
        loads.append(("original", "torch", lambda: load_model(resolve_model(arguments.original), dtype, device)))
    rows: list[Throughput] = []
    try:
        for label, backend, load in loads:
            rows.append(measure(label, backend, load(), arguments.calls, not arguments.no_graph))
            gc.collect()
    except LqerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{device_name(device)}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}\n\n{table(rows)}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
