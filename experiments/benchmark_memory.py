"""Peak memory of the pipeline on a checkpoint larger than it: grows with a block, not with the number of blocks.

    python experiments/benchmark_memory.py [--shapes 2048x5504 ...] [--blocks 16 32 64 ...] [--limit 2.5GB]
        [--method qera-exact] [--rank 32] [--max-memory 256MB] [--windows 4] [--seq-len 256] [--folder DIR]

For every hidden x intermediate size and number of blocks: writes a Llama-shaped checkpoint of random bfloat16 weights
in several safetensors files, runs calibrate, quantize and blockwise evaluation of the original and of the quantized
model on it in a process of its own, and kills that process when its resident memory exceeds --limit. Everything lies
under --folder (default: here), and is removed after each run. Exit status 1 if a run was killed or failed.

Resident memory is what is limited, not address space, which costs nothing until it is touched; all of it: anonymous
pages (tensors, the interpreter) and pages of files (libraries; tensors that were spilled to disk, as long as they are
in use). The peak is the kernel's own high-water mark, which the run reports; "anonymous" is the most that was seen of
that part, looked at a hundred times a second, and the peaks of calibrate, quantize and evaluate are the most that was
seen of all of it from the first file of that stage on, up to the next one's. "estimated" is the largest of the stages'
estimates that the run began with.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import tomli_w
import torch
from measures.watching import STAGES, current_stage, watched
from pipeline_benchmark.checkpoint import Shape, byte_tokenizer, write_model

from lqer.config import read_config
from lqer.report.environment import device_name
from lqer.resources.machine import resident_bytes
from lqer.resources.workload import total
from lqer.run.context import prepare
from lqer.run.preflight import estimate_stages
from lqer.store.offload import parse_bytes

ROOT = Path(__file__).parents[1]
TAG, CONFIG = "memory", "memory.toml"


@dataclass(frozen=True)
class Peak:
    """What a run held at most, in bytes, in all and by stage; `exceeded` where it was killed for it."""

    resident: int
    anonymous: int
    by_stage: dict[str, int]
    exceeded: bool
    status: int
    seconds: float
    errors: str


def write_experiment(folder: Path, arguments: argparse.Namespace) -> Path:
    """The configuration of one run of `folder`'s model; text is CPython's own documentation."""
    text = {"seq_len": arguments.seq_len, "batch_size": 1}
    experiment = {
        "extends": str(ROOT / "configs/formats/mxint.toml"),
        "model": str(folder / "model"),
        "output_dir": str(folder / "runs"),
        "tag": TAG,
        "device": "cpu",
        "calibration": {
            "dataset": "pydoc",
            "num_samples": arguments.windows,
            "error_tokens": 64,
            "max_memory": arguments.max_memory,
            **text,
        },
        "quantize": {
            "method": arguments.method,
            "weight": "w4",
            "low_rank": {"rank": arguments.rank, "format": "x8"},
        },
        "evaluation": {
            "blockwise": True,
            "perplexity": {"datasets": ["pydoc"], "max_windows": arguments.windows, **text},
        },
    }
    path = folder / CONFIG
    path.write_text(tomli_w.dumps(experiment))
    return path


def watch(command: list[str], limit: int, errors: Path, stage: Callable[[], str]) -> Peak:
    """Run a command, and kill it once its resident memory exceeds `limit` bytes. `stage` tells what it is at."""
    anonymous = 0
    by_stage: dict[str, int] = {}
    exceeded = False

    def look(process: psutil.Process) -> bool:
        nonlocal anonymous, exceeded
        memory, now = process.memory_info(), stage()
        by_stage[now] = max(by_stage.get(now, 0), memory.rss)
        anonymous = max(anonymous, memory.rss - getattr(memory, "shared", 0))
        exceeded = memory.rss > limit
        return exceeded

    status, seconds = watched(command, errors, look)
    return Peak(
        resident=max(by_stage.values(), default=0),
        anonymous=anonymous,
        by_stage=by_stage,
        exceeded=exceeded,
        status=status,
        seconds=seconds,
        errors=errors.read_text(encoding="utf-8"),
    )


def measure(folder: Path, arguments: argparse.Namespace) -> tuple[Peak, dict]:
    """Run the experiment of `folder`. Returns its peak, and results.json where it came to an end within the limit."""
    config = write_experiment(folder, arguments)
    limit = parse_bytes(arguments.limit)
    command = [sys.executable, str(ROOT / "experiments/pipeline.py"), str(config)]
    peak = watch(command, limit, folder / "errors.txt", lambda: current_stage(folder / "runs" / "store"))
    if peak.status != 0:
        return peak, {}
    results = json.loads((folder / "runs" / TAG / "results.json").read_text(encoding="utf-8"))
    # Between two looks it may have been more. The kernel's own mark lags behind what it shows by some pages a thread.
    highest = max(results["peak_memory_bytes"], peak.resident)
    return replace(peak, resident=highest, exceeded=highest > limit), results


def estimated_peak(folder: Path) -> int:
    """What a run of `folder`'s experiment expects to hold; this process has imported what the run starts with."""
    stages = estimate_stages(prepare(read_config(folder / CONFIG)))
    return resident_bytes() + max(total(stage.ram) for stage in stages)


def row(shape: Shape, stored: int, estimated: int, peak: Peak, results: dict) -> str:
    block = (stored - 2 * 2 * shape.vocabulary * shape.hidden) / shape.blocks
    cells = [
        f"{shape.hidden}x{shape.intermediate}", shape.blocks, f"{block / 1e6:.1f} MB", f"{stored / 1e9:.2f} GB",
        f"{estimated / 1e9:.2f} GB",
        f"{peak.resident / 1e9:.2f} GB{' (killed)' if peak.exceeded else ''}", f"{peak.anonymous / 1e9:.2f} GB",
        f"{stored / peak.resident:.1f}x",
    ]  # fmt: skip
    cells += [f"{peak.by_stage[stage] / 1e9:.2f} GB" if stage in peak.by_stage else "–" for stage in STAGES]
    seconds = results.get("seconds")
    cells += [f"{seconds[stage]:.0f} s" for stage in STAGES] if seconds else ["–"] * len(STAGES)
    return f"| {' | '.join(map(str, [*cells, f'{peak.seconds:.0f} s']))} |"


HEADER = (
    "hidden x intermediate", "blocks", "a block", "checkpoint", "estimated", "peak resident", "of it anonymous",
    "checkpoint / peak", *(f"peak: {stage}" for stage in STAGES), *STAGES, "in all",
)  # fmt: skip


def _shape(text: str) -> tuple[int, int]:
    hidden, _, intermediate = text.partition("x")
    return int(hidden), int(intermediate)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=_shape, default=[(2048, 5504)])
    parser.add_argument("--blocks", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--limit", default="2.5GB")
    parser.add_argument("--method", default="qera-exact")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--max-memory", default="256MB", help="calibration.max_memory")
    parser.add_argument("--windows", type=int, default=4, help="to calibrate on, and as many to evaluate on")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=Path())
    return parser.parse_args(arguments)


def main() -> int:
    arguments = parse()
    print(f"{device_name(torch.device('cpu'))}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; "
          f"{arguments.method}, limit {arguments.limit}\n")  # fmt: skip
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", flush=True)
    failed = False
    for hidden, intermediate in arguments.shapes:
        for blocks in arguments.blocks:
            shape = Shape(hidden, intermediate, blocks, arguments.vocabulary)
            with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="memory-") as name:
                folder = Path(name)
                stored = write_model(folder / "model", shape, byte_tokenizer())
                peak, results = measure(folder, arguments)
                estimated = estimated_peak(folder)
            print(row(shape, stored, estimated, peak, results), flush=True)
            if peak.exceeded or peak.status != 0:
                failed = True
                last = peak.errors.strip().splitlines()[-1:] or ["it wrote no error"]
                print(f"error: {'killed beyond the limit' if peak.exceeded else last[0]}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
