"""Seconds that perplexity over a text takes on a 7B-shaped model with packed weights, and in bf16.

    python experiments/benchmark_evaluation.py [SCHEME ...] [--windows 148] [--timed 20] [--seq-len 2048] [--json FILE]

The models are those of benchmark_decoder.py; W4A8 rounds the operands of attention too, as its preset does. `--timed`
windows of random tokens are scored one at a time, and their time is scaled to `--windows`, by default those of
WikiText-2's test text. The first window, which compiles kernels, is counted apart. Prints a table as markdown. Exit
status: 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decoder_benchmark.models import BF16, CONFIG, LABELS, X8, build, known_scheme

from lqer.evaluation.perplexity import window_nlls
from lqer.nn.attention import QuantizedAttention, quantize_attention
from lqer.report.environment import device_name

TIMED = ("trellis2", "w4a8-rank32", "e8p-rank64", "int4-g128", BF16)
WITH_ATTENTION = ("w4a8-rank32",)


def time_windows(
    scheme: str, windows: int, seq_len: int, config: dict[str, Any], device: torch.device
) -> tuple[float, float]:
    """Seconds of a window, and of the first one."""
    model: Any = build(scheme, config, device)
    if scheme in WITH_ATTENTION:
        quantize_attention(model, QuantizedAttention(X8, "reduction"))
    generator = torch.Generator().manual_seed(0)
    windows_WT = torch.randint(0, config["vocab_size"], (windows + 1, seq_len), generator=generator)

    def seconds(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    first = seconds(lambda: window_nlls(model, windows_WT[:1].split(1), progress=False))
    return seconds(lambda: window_nlls(model, windows_WT[1:].split(1), progress=False)) / windows, first


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "schemes", nargs="*", type=known_scheme, default=TIMED, metavar="SCHEME", help=f"by default {', '.join(TIMED)}"
    )
    parser.add_argument("--windows", type=int, default=148)
    parser.add_argument("--timed", type=int, default=20)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    if not torch.cuda.is_available():
        print("error: benchmark_evaluation.py needs an NVIDIA GPU, and torch finds none here", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    print(f"{device_name(device)}, torch {torch.__version__}\n")
    print(f"| model | windows timed | {arguments.windows} windows | the first window |\n|---|---|---|---|")
    rows = []
    for scheme in arguments.schemes:
        seconds, first = time_windows(scheme, arguments.timed, arguments.seq_len, CONFIG, device)
        label = LABELS[scheme] + (", attention in x8" if scheme in WITH_ATTENTION else "")
        print(f"| {label} | {arguments.timed} | {arguments.windows * seconds:.1f} s | {first:.1f} s |", flush=True)
        rows.append({"scheme": scheme, "seconds": seconds, "first": first})
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
