"""What AWQ's scales and clipped ranges cost: seconds per decoder block of some shape, on random weights.

    python experiments/benchmark_block_transforms.py [--hidden 4096] [--intermediate 11008] [--sequences 128]

The defaults are a block of Llama-2-7B and the calibration of configs/methods/awq.toml. States lie on the device, as the
pipeline puts them where they fit. The first repeat warms up and is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from measures.random_block import random_block

from lqer.formats import Int
from lqer.models.source import pick_device
from lqer.models.structure import block_linears
from lqer.report.environment import device_name
from lqer.transforms import Awq, Clip
from lqer.transforms.block_problem import BlockProblem
from lqer.transforms.block_result import BlockResult
from lqer.transforms.block_transform import no_progress, save_nothing


def random_problem(arguments: argparse.Namespace, device: torch.device) -> BlockProblem:
    torch.manual_seed(0)
    call = random_block(arguments.hidden, arguments.intermediate, arguments.heads, arguments.seq_len, device)
    dtype = torch.bfloat16 if arguments.autocast == "bfloat16" else torch.float32
    with device:
        channel_D = (0.5 * torch.randn(arguments.hidden)).exp()
        inputs_STD = torch.randn(arguments.sequences, arguments.seq_len, arguments.hidden, dtype=dtype)
        inputs_STD *= channel_D.to(dtype)
    return BlockProblem(
        call=call,
        inputs_STD=inputs_STD,
        targets_STD=inputs_STD,
        formats={name: Int(bits=arguments.bits, block_size=arguments.group) for name in block_linears(call.block)},
        batch_size=arguments.batch_size,
        autocast=torch.bfloat16 if arguments.autocast == "bfloat16" else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--autocast", choices=["bfloat16", "none"], default="bfloat16")
    arguments = parser.parse_args()
    device = pick_device("auto")
    problem = random_problem(arguments, device)
    seconds: dict[str, list[float]] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for repeat in range(arguments.repeats + 1):
        result = BlockResult()
        for transform in (Awq(), Clip()):
            started = time.perf_counter()
            result = transform.apply(problem, result, no_progress, save_nothing)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds.setdefault(transform.kind, []).append(time.perf_counter() - started)
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    print(f"{device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads, {vars(arguments)}")
    parts = ", ".join(f"{kind} {median:.3f} s" for kind, median in medians.items())
    print(f"{parts} a block; 32 blocks: {32 * sum(medians.values()):.1f} s; ratios {result.notes['awq']}")
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
