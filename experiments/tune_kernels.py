"""Write lqer/kernels/table.json: time every candidate launch on this GPU and store the fastest for each shape.

    python experiments/tune_kernels.py [--out lqer/kernels/table.json] [--processes 14] [--only gemv]

Candidates are first compiled in parallel processes, into Triton's cache. Then they are timed one after another, as
replays of a CUDA graph over copies of the weights that do not fit in the L2 cache. A launch of the gemm kernel is used
for layers with and without a low-rank branch; the geometric mean of both decides. This takes more than four minutes,
most of them compilation.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import math
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from kernel_benchmark import timing
from torch import Tensor

from lqer.formats import MXInt
from lqer.kernels import PackedLinear
from lqer.kernels.dequantize_launch import run_dequantized
from lqer.kernels.integers.launch import run_gemm, run_gemv
from lqer.kernels.tuning import BUCKETS, TABLE, GemmLaunch, GemvLaunch

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096), (8192, 8192), (8192, 28672))
FEWER_SHAPES = ((4096, 4096), (8192, 8192))
RANK = 32
ROTATED_BYTES = 250e6
BUDGET_MS = 12.0
DEVICE = "cuda"


@dataclass(frozen=True)
class Problem:
    """One row of the table: a kernel and a shape, and for the gemm kernel also the code width and the bucket of M."""

    kernel: str
    k: int
    n: int
    width: int
    m: int

    def candidates(self) -> Sequence[GemmLaunch | GemvLaunch | None]:
        if self.kernel == "gemv":
            shapes = ((2, 2), (4, 2), (4, 4), (8, 4), (8, 8), (8, 16), (16, 8), (16, 16))
            return [GemvLaunch(16, block_t, warps) for block_t, warps in shapes] + [GemvLaunch(32, 4, 8)]
        tiles = self.k // (16 * 32 // self.width)
        block_ms = (self.m,) if self.m <= 64 else (64, 128)
        few = self.width != 4
        found: list[GemmLaunch | None] = [None] if self.m >= 128 else []
        for (block_n, warps), block_m in itertools.product(((64, 4), (128, 4), (128, 8)), block_ms):
            if block_m == 128 and (block_n, warps) == (128, 4):
                continue  # its accumulators alone would need all registers
            output_tiles = self.n // block_n * -(-self.m // block_m)
            splits = sorted(
                (s for s in range(1, min(tiles // 2, 16) + 1) if 0.7 <= output_tiles * s / 132 <= 6.1 or s == 1),
                key=partial(_waste, output_tiles, tiles),
            )
            for split, stages in itertools.product(splits[: 2 if few else 3], (3,) if few else (3, 4)):
                found.append(GemmLaunch(block_n, block_m, split, stages, warps))
        return found

    def layers(self) -> list[PackedLinear]:
        """The layers that a launch is timed on: W4A8 with a branch; for the gemm kernel also W4A16 without one."""
        weight_OI = torch.randn(self.n, self.k, device=DEVICE, generator=_generator()) * 0.02
        weight = MXInt(self.width).quantize(weight_OI)
        a = MXInt(8).quantize(torch.randn(self.k, RANK, device=DEVICE, generator=_generator()), axis=0)
        b = MXInt(8).quantize(torch.randn(RANK, self.n, device=DEVICE, generator=_generator()), axis=0)
        with_branch = PackedLinear.pack(weight, a, b, None, MXInt(8), torch.bfloat16)
        if self.kernel == "gemv":
            return [with_branch]
        return [with_branch, PackedLinear.pack(weight, None, None, None, None, torch.bfloat16)]

    def input(self) -> Tensor:
        return torch.randn(self.m, self.k, device=DEVICE, generator=_generator()).to(torch.bfloat16)


def _generator() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(0)


def _waste(output_tiles: int, tiles: int, splits: int) -> float:
    """Work of the fullest multiprocessor relative to the mean, times the imbalance of the splits of K."""
    waves = output_tiles * splits / 132
    return math.ceil(waves) / waves * -(-tiles // splits) * splits / tiles


def problems(kernels: Sequence[str]) -> list[Problem]:
    found = [Problem("gemv", k, n, 4, 1) for k, n in SHAPES]
    for width, shapes in ((4, SHAPES), (2, FEWER_SHAPES), (8, FEWER_SHAPES)):
        found += [Problem("gemm", k, n, width, m) for k, n in shapes for m in BUCKETS]
    return [problem for problem in found if problem.kernel in kernels]


def call(launch: GemmLaunch | GemvLaunch | None) -> Callable[[Tensor, PackedLinear], Tensor]:
    if launch is None:
        return run_dequantized
    if isinstance(launch, GemvLaunch):
        return lambda x_MI, layer: run_gemv(x_MI, layer, launch)
    return lambda x_MI, layer: run_gemm(x_MI, layer, launch)


def compile_all(problem: Problem) -> None:
    """Run every candidate once; `fastest` skips those that fail."""
    x_MI = problem.input()
    for layer, launch in itertools.product(problem.layers(), problem.candidates()):
        try:
            call(launch)(x_MI, layer)
        except Exception as error:
            print(f"{problem} {launch}: {error!r}"[:300], file=sys.stderr)
    torch.cuda.synchronize()


def fastest(problem: Problem) -> dict:
    x_MI = problem.input()
    logarithms: dict[GemmLaunch | GemvLaunch | None, list[float]] = {}
    judged_on = problem.layers()
    for first in judged_on:
        copies = max(2, math.ceil(ROTATED_BYTES / first.nbytes))
        layers = [first, *(copy.deepcopy(first) for _ in range(copies - 1))]
        for launch in problem.candidates():
            calls = [partial(call(launch), x_MI, layer) for layer in layers]
            try:
                calls[0]()
                graph = timing.graph_of(calls, 1)
            except Exception:
                continue
            microseconds = timing.median_us(graph.replay, BUDGET_MS) / copies
            logarithms.setdefault(launch, []).append(math.log(microseconds))
    means = {
        launch: math.exp(sum(found) / len(found))
        for launch, found in logarithms.items()
        if len(found) == len(judged_on)
    }
    launch = min(means, key=means.__getitem__)
    microseconds = means[launch]
    row = {"kernel": problem.kernel, "n": problem.n, "k": problem.k}
    if problem.kernel == "gemm":
        row |= {"width": problem.width, "m": problem.m}
    measured = {"gpu": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat()}
    return row | {"launch": launch and asdict(launch), "us": round(microseconds, 2)} | measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--only", choices=("gemv", "gemm"), help="measure one kernel and keep the other rows")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: tune_kernels.py needs an NVIDIA GPU, and torch finds none here", file=sys.stderr)
        return 2
    torch.set_grad_enabled(False)
    todo = problems([arguments.only] if arguments.only else ["gemv", "gemm"])
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        pool.map(compile_all, todo, chunksize=1)
    kept = json.loads(TABLE.read_text())["launches"] if arguments.only else []
    rows = [row for row in kept if row["kernel"] != arguments.only]
    for problem in todo:
        rows.append(fastest(problem))
        print(json.dumps(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    arguments.out.write_text('{"launches": [\n  ' + lines + "\n]}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
