"""What trellis codes cost to find and what they leave of normal weights.

    python experiments/benchmark_trellis.py [--device cpu|cuda] [--shapes 1536x1536 256x1536 8960x1536 1536x8960]
        [--bits 2 3 4] [--state-bits 12] [--table gaussian] [--repeats 3] [--warps 8]

Shapes are out_features x in_features; those of one decoder block of a 1.5B model by default. A table as markdown: the
time of searching all tiles of a matrix at once (nearest), the time of LDLQ, which searches a column of tiles after the
other, under a random Hessian, the weights per second of either, and the mean squared error of nearest over the mean
square of the weights. Times are the least of the repeats, after a run that compiles. --warps: of a forward program on
a GPU, instead of those that the kernel's host code picks.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from functools import partial

import torch
from measures.seconds import least_seconds
from torch import Tensor

from lqer.formats import Trellis, viterbi_kernel
from lqer.rounding.hessian import DampedHessian, damp
from lqer.rounding.ldlq import ldlq


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="*", default=["1536x1536", "256x1536", "8960x1536", "1536x8960"])
    parser.add_argument("--bits", nargs="*", type=int, default=[2, 3, 4])
    parser.add_argument("--state-bits", nargs="*", type=int, default=[12])
    parser.add_argument("--table", nargs="*", default=["gaussian"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warps", type=int)
    arguments = parser.parse_args()
    if arguments.warps is not None:
        viterbi_kernel.LEAST_WARPS = viterbi_kernel.MOST_WARPS = arguments.warps
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}\n")
    print("| out x in | bits | state bits | table | nearest (s) | M weights/s | LDLQ (s) | M weights/s | error |")
    print("|" + "---|" * 9)
    for shape in arguments.shapes:
        weight_OI, damped = layer(shape, arguments.device)
        for chosen in itertools.product(arguments.bits, arguments.state_bits, arguments.table):
            cells = row(Trellis(*chosen), weight_OI, damped, arguments.repeats)
            print("| " + " | ".join([shape, *map(str, chosen), *cells]) + " |", flush=True)
    return 0


def layer(shape: str, device: str) -> tuple[Tensor, DampedHessian]:
    """A normal weight of that shape and the Hessian of correlated inputs."""
    out_features, in_features = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(out_features, in_features, generator=generator).to(device)
    x_TI = torch.randn(in_features, in_features, generator=generator).to(device)
    return weight_OI, damp(x_TI.T @ x_TI + in_features * torch.eye(in_features, device=device))


def row(number_format: Trellis, weight_OI: Tensor, damped: DampedHessian, repeats: int) -> list[str]:
    """Times and rates of both ways, and the error of a part of the weight, 512 rows and columns at most."""
    part_OI = weight_OI[:512, :512].contiguous()
    error_OI = number_format.quantize(part_OI).dequantize() - part_OI
    ways = (partial(number_format.quantize, weight_OI), partial(ldlq, weight_OI, damped, number_format))
    seconds = [least_seconds(run, repeats, weight_OI.device)[0] for run in ways]
    cells = [cell for time_s in seconds for cell in (f"{time_s:.3f}", f"{weight_OI.numel() / time_s / 1e6:.2f}")]
    return [*cells, f"{float(error_OI.square().mean() / part_OI.square().mean()):.5f}"]


if __name__ == "__main__":
    sys.exit(main())
