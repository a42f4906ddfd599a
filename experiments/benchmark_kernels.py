"""Compare packed linears with cuBLAS bf16, humming, gemlite, tinygemm and our emulation on one GPU.

    python experiments/benchmark_kernels.py [--only a,b] [--quick] [--json checkpoints/benchmark_kernels.json]

Prints the table of docs/results/kernels.md as markdown and writes every number as JSON; progress goes to stderr. The
table names peers that are not installed. Exit status: 0 whatever the verdicts, 2 without a GPU or for a wrong option.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from kernel_benchmark import measure, peers, report, rows, timing, trial
from kernel_benchmark.contenders import LABELS
from kernel_benchmark.results import Key, Measurement, Scene, evaluate

BUDGET_MS, QUICK_BUDGET_MS = 60.0, 15.0
TIME_LIMIT_SECONDS = 480.0
METHOD = (
    "Times are medians over replays of a CUDA graph with one call per copy of the weights, repeated if that is short; "
    f"{measure.ROTATED_BYTES / 1e6:.0f} MB of weights are read between two uses of a copy; the contenders of a shape "
    f"alternate, {measure.REPETITIONS} times; random data."
)


def main() -> int:
    arguments = _arguments()
    if not torch.cuda.is_available():
        print("error: benchmark_kernels.py needs an NVIDIA GPU, and torch finds none here", file=sys.stderr)
        return 2
    torch.set_grad_enabled(False)
    plan = rows.scenes_of(arguments.only)
    jobs = trial.jobs_of(plan)
    if arguments.trial:
        index, count, log = arguments.trial
        return trial.run_worker(jobs, int(index), int(count), Path(log))
    started = time.monotonic()
    problems: dict[trial.Job, str] = {}
    if jobs and not arguments.no_trial:
        _say(f"compiling and running {len(jobs)} contenders once")
        command = trial.worker_command(__file__, ["--only", ",".join(arguments.only)])
        problems = trial.run_trials(jobs, command)
        _say(f"done after {time.monotonic() - started:.0f} s, {len(problems)} with a problem")
    environment = _environment()
    settings = measure.Settings(
        QUICK_BUDGET_MS if arguments.quick else BUDGET_MS,
        warm=not arguments.quick,
        bytes_per_second=environment["copy_bytes_per_second"],
        operations_per_second=environment["matmul_operations_per_second"],
    )
    measurements: dict[Key, Measurement] = {}
    for scene, names in _barred_first(plan):
        _say(f"{time.monotonic() - started:4.0f} s  {scene.k}x{scene.n}, M={scene.m}: {', '.join(names)}")
        late = time.monotonic() - started > arguments.limit
        known = {name: problems[scene, name] for name in names if (scene, name) in problems}
        if late:
            known = dict.fromkeys(names, f"not run: the limit of {arguments.limit:.0f} s was used up")
        measured = measure.run_scene(scene, names, settings, known)
        measurements |= {(row.scene, row.contender): row for row in measured}
        torch.cuda.empty_cache()
        bars = [evaluate(bar, measurements, LABELS) for bar in rows.BARS if bar.group in arguments.only]
        result = report.to_report(environment, bars, list(measurements.values()))
        # After every scene, so that a killed run leaves its results so far.
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(report.markdown(result), end="")
    _say(f"{time.monotonic() - started:.0f} s; {arguments.json}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = "; ".join(f"{letter}: {text}" for letter, text in rows.GROUPS.items())
    parser.add_argument("--only", type=_groups, default=list(rows.GROUPS), help=f"groups, with commas: {groups}")
    parser.add_argument("--quick", action="store_true", help="a quarter of the samples, no times with a warm L2 cache")
    parser.add_argument("--json", type=Path, default=Path("checkpoints/benchmark_kernels.json"))
    parser.add_argument("--limit", type=float, default=TIME_LIMIT_SECONDS, help="seconds after which no scene starts")
    parser.add_argument("--no-trial", action="store_true", help="compile in this process, one contender after another")
    parser.add_argument("--trial", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def _groups(text: str) -> list[str]:
    """The named groups in the order of the table. Raises ArgumentTypeError for an unknown name."""
    named = text.split(",")
    unknown = [name for name in named if name not in rows.GROUPS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(rows.GROUPS)}")
    return [name for name in rows.GROUPS if name in named]


def _barred_first(plan: dict[Scene, list[str]]) -> list[tuple[Scene, list[str]]]:
    """The scenes, those that have a bar first."""
    barred = {scene for bar in rows.BARS for scene, _ in bar.against}
    return sorted(plan.items(), key=lambda item: item[0] not in barred)


def _environment() -> dict[str, Any]:
    """Versions and hardware, and the two rates of the lower bounds."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "gpu": properties.name,
        "driver": _driver(),
        "versions": peers.versions(),
        "l2_bytes": properties.L2_cache_size,
        "copy_bytes_per_second": timing.copy_bandwidth(),
        "matmul_operations_per_second": timing.matmul_rate(),
        "method": METHOD,
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
