"""What adaptive rounding of one decoder block costs: seconds a step and peak memory, on random weights of some shape.

    python experiments/benchmark_block_reconstruction.py [--hidden 4096] [--intermediate 11008] [--steps 250]

The defaults are a block of Llama-2-7B on batches of 4 x 2048 tokens, whose states lie on the device, as the pipeline
puts them where they fit; the time of 20 rounds of 250 steps is what the measured rounds extrapolate to. The first round
warms up and is not counted. --soft-weight torch: without the kernels that make it on a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import torch
from measures.random_block import random_block
from torch import Tensor

from lqer.formats import Int
from lqer.models.source import pick_device
from lqer.models.structure import block_linears
from lqer.report.environment import device_name
from lqer.rounding.adaptive import Adaptive, AdaptiveState, round_block
from lqer.rounding.batches import Goal
from lqer.rounding.soft import Grid, _SoftWeight

PUBLISHED_STEPS = 20 * 250
SEQUENCES = 32


def in_torch() -> AbstractContextManager:
    """The soft weight in float32 and in PyTorch, as on a CPU."""

    def weight(grid: Grid, v_OI: Tensor, u_ON: Tensor | None, dtype: torch.dtype) -> Tensor:
        step_ON = grid.spacing.step_G if u_ON is None else grid._stretched(u_ON)
        return _SoftWeight.apply(v_OI, step_ON, grid)

    return mock.patch.object(Grid, "weight", weight)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=1, help="after the one that warms up")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--soft-weight", choices=["kernels", "torch"], default="kernels")
    parser.add_argument("--autocast", choices=["bfloat16", "none"], default="bfloat16")
    return parser.parse_args()


def time_rounds(arguments: argparse.Namespace, device: torch.device) -> tuple[float, list[float]]:
    """Seconds a step without the first round, and the mean loss of every round."""
    call = random_block(arguments.hidden, arguments.intermediate, arguments.heads, arguments.seq_len, device)
    hidden_STD = torch.randn(SEQUENCES, arguments.seq_len, arguments.hidden, dtype=torch.bfloat16, device=device)
    weights = {f"{name}.weight": linear.weight.detach() for name, linear in block_linears(call.block).items()}
    starts = {name: Int(bits=arguments.bits, block_size=arguments.group).quantize(w) for name, w in weights.items()}
    autocast = None if arguments.autocast == "none" else torch.bfloat16

    def run(parameters: Mapping[str, Tensor], x_BTD: Tensor) -> Tensor:
        return call(parameters, x_BTD.float())

    with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
        targets_STD = torch.cat([run({}, x).to(torch.bfloat16) for x in hidden_STD.split(1)])
    ends: list[float] = []
    losses: list[float] = []

    def end_round(state: AdaptiveState) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        losses[:] = state.losses.tolist()

    settings = Adaptive(
        soft_fractions=tuple(0.8 - 0.7 * i / (arguments.rounds + 1) for i in range(arguments.rounds + 1)),
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        micro_batch=arguments.micro_batch,
    )
    goal = Goal(run, hidden_STD, [targets_STD], autocast)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with in_torch() if arguments.soft_weight == "torch" else nullcontext():
        round_block(weights, starts, goal, settings, after_round=end_round)
    return (ends[-1] - ends[0]) / (arguments.rounds * arguments.steps), losses


def main() -> None:
    arguments, device = _arguments(), pick_device("auto")
    torch.manual_seed(0)
    seconds, losses = time_rounds(arguments, device)
    print(f"{device_name(device)}, {vars(arguments)}")
    print(f"mean loss of each round: {', '.join(f'{loss:.5g}' for loss in losses)}")
    print(f"{1e3 * seconds:.1f} ms a step; 20 rounds of 250 steps: {PUBLISHED_STEPS * seconds / 60:.1f} minutes")
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
