"""Memory and time of a whole run on the shape of a large mixture of experts: random weights as they are published.

    python experiments/benchmark_mixtures.py [--shape deepseek-v3] [--methods lqer-act gptq trellis-3] [--divide 1]
        [--experts N] [--windows 8] [--seq-len 2048] [--max-memory 4GB] [--limit 24GB] [--seconds N] [--device auto]
        [--folder DIR]

Two decoder blocks, the first of them dense where the model has such ones, are written under --folder in FP8 or MXFP4.
`pipeline.py` then calibrates on and quantizes them, and evaluates the quantized model block by block on one window, in
a process of its own. trellis-3 is the preset best-3 with one width for all: linears in turn, on the
inputs that the quantized ones before them compute. --divide: of all widths, --experts: of those; both for a machine
that has less.

What counts as memory of the host is what the kernel cannot drop: anonymous pages, and shared memory (RssAnon and
RssShmem of /proc/PID/status, looked at a hundred times a second), not pages of files that are mapped. A driver's
page-locked memory is in neither; so the most that the machine's available memory fell by while the process ran
(MemAvailable of /proc/meminfo, which counts other processes and files in memory, too) stands beside it. Of a GPU it is
what PyTorch allocated at most, and what its free memory fell by. A run is stopped after --seconds, and its row is that
of the stages until then. Exit status 1 where a run failed or held more than --limit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tomli_w
import torch
from measures.watching import current_stage, watched
from pipeline_benchmark.checkpoint import byte_tokenizer
from pipeline_benchmark.mixture import QUANTIZATION, SHAPES, write_mixture
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lqer.config import read_config
from lqer.models.source import pick_device
from lqer.report.environment import device_name
from lqer.resources.workload import total
from lqer.run.context import prepare
from lqer.run.preflight import estimate_stages
from lqer.store.offload import parse_bytes

ROOT = Path(__file__).parents[1]
METHODS = ("lqer-act", "gptq", "trellis-3")
WIDTHS = (
    "hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads",
    "q_lora_rank", "kv_lora_rank",
)  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {"trellis-3": {"order": "sequential"}}


@dataclass(frozen=True)
class Peak:
    """The most that was seen, in bytes: by stage of a process's own memory, and of what machine and GPU lacked.

    status: None where it was stopped.
    """

    own: dict[str, int]
    machine: int
    gpu: int
    status: int | None
    seconds: float


def shape_of(name: str, divide: int, experts: int | None) -> PreTrainedConfig:
    kind, sizes, _ = SHAPES[name]
    config = AutoConfig.for_model(kind, **sizes)
    for key in WIDTHS:
        if (size := getattr(config, key, None)) is not None:
            setattr(config, key, size // divide)
    if experts is not None:
        setattr(config, "num_local_experts" if kind == "gpt_oss" else "n_routed_experts", experts)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    return config


def write_experiment(folder: Path, method: str, given: argparse.Namespace) -> Path:
    """The configuration of one run; text is Python's own documentation."""
    text = {"seq_len": given.seq_len, "batch_size": 1}
    experiment = {
        "extends": str(ROOT / "configs" / "methods" / f"{method}.toml"),
        "model": str(folder / "model"),
        "output_dir": str(folder / method),
        "tag": method,
        "device": given.device,
        "dtype": "bfloat16",
        "calibration": {
            "dataset": "pydoc", "num_samples": given.windows, "error_tokens": 64, "max_memory": given.max_memory, **text
        },
        "quantize": PRESETS.get(method, {}),
        "evaluation": {
            "blockwise": True,
            "baselines": [],
            "perplexity": {"datasets": ["pydoc"], "max_windows": 1, **text},
        },
    }  # fmt: skip
    path = folder / f"{method}.toml"
    path.write_text(tomli_w.dumps(experiment), encoding="utf-8")
    return path


def fields(file: Path, *names: str) -> int:
    """The sum of these fields of a file of /proc, in bytes."""
    lines = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    return 1024 * sum(int(line[1]) for line in lines if line[0].removesuffix(":") in names)


def free_on(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def watch(command: list[str], store: Path, errors: Path, device: torch.device, most_seconds: float) -> Peak:
    """Run a command and look at the memory that it takes."""
    started, available, free = time.monotonic(), fields(Path("/proc/meminfo"), "MemAvailable"), free_on(device)
    own: dict[str, int] = {}
    machine = gpu = 0
    is_stopped = False

    def look(process: psutil.Process) -> bool:
        nonlocal machine, gpu, is_stopped
        try:
            held = fields(Path(f"/proc/{process.pid}/status"), "RssAnon", "RssShmem")
        except OSError:
            raise psutil.NoSuchProcess(process.pid) from None
        stage = current_stage(store)
        own[stage] = max(own.get(stage, 0), held)
        machine = max(machine, available - fields(Path("/proc/meminfo"), "MemAvailable"))
        gpu = max(gpu, free - free_on(device))
        is_stopped = time.monotonic() - started > most_seconds
        return is_stopped

    status, seconds = watched(command, errors, look)
    return Peak(own, machine, gpu, None if is_stopped else status, seconds)


def row(folder: Path, method: str, given: argparse.Namespace, device: torch.device) -> tuple[str, bool]:
    """The cells of a run, and whether it held no more than the limit."""
    config = write_experiment(folder, method, given)
    stages = estimate_stages(prepare(read_config(config)))
    ram, gpu = (max(total(needs) for needs in places) for places in zip(*((s.ram, s.device) for s in stages)))
    command = [sys.executable, str(ROOT / "experiments/pipeline.py"), str(config)]
    runs = folder / method
    peak = watch(command, runs / "store", folder / f"{method}.err", device, given.seconds)
    if peak.status:
        last = (folder / f"{method}.err").read_text(encoding="utf-8").strip().splitlines()[-1:]
        return f"failed after {peak.seconds:.0f} s: {''.join(last)}", False
    results: dict[str, Any] = {"seconds": {"stopped after": peak.seconds}, "peak_memory_bytes": float("nan")}
    if peak.status is not None:
        results = json.loads((runs / method / "results.json").read_text(encoding="utf-8"))
    cells = [
        gigabytes(ram), gigabytes(max(peak.own.values())), gigabytes(peak.machine),
        ", ".join(f"{stage} {gigabytes(held)}" for stage, held in peak.own.items()),
        *map(gigabytes, (gpu, results["peak_memory_bytes"], peak.gpu) if device.type == "cuda" else ()),
        ", ".join(f"{stage} {taken:.0f}" for stage, taken in results["seconds"].items() if taken >= 0.5),
        f"{peak.seconds:.0f}",
    ]  # fmt: skip
    return " | ".join(cells), max(peak.own.values()) <= parse_bytes(given.limit)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f}"


def header(device: torch.device) -> list[str]:
    of_gpu = ["GPU, estimated", "allocated", "in use"] if device.type == "cuda" else []
    return ["method", "RAM, estimated, GB", "held", "machine", "held by stage", *of_gpu, "seconds by stage", "in all"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    written = [name for name, (kind, *_) in SHAPES.items() if kind in QUANTIZATION]
    parser.add_argument("--shape", choices=written, default="deepseek-v3")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--divide", type=int, default=1)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--max-memory", default="4GB", help="calibration.max_memory")
    parser.add_argument("--limit", default="24GB")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, default=Path())
    given = parser.parse_args()
    device, fits = pick_device(given.device), True
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="mixture-") as name:
        folder, started = Path(name).absolute(), time.monotonic()
        stored = write_mixture(
            folder / "model", shape_of(given.shape, given.divide, given.experts), byte_tokenizer(), device
        )
        if device.type == "cuda":
            torch.cuda.empty_cache()
        columns = header(device)
        print(
            f"{device_name(device)}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; {given.shape}, widths / "
            f"{given.divide}, {stored / 1e9:.2f} GB written in {time.monotonic() - started:.0f} s, {given.windows} "
            f"windows of {given.seq_len} tokens\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}",
            flush=True,
        )
        for method in given.methods:
            cells, is_within = row(folder, method, given, device)
            fits &= is_within
            print(f"| {method} | {cells} |", flush=True)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
