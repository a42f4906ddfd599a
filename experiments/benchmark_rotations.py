"""Hadamard transforms of bfloat16 activations on a GPU: one kernel against two matrix products.

    python experiments/benchmark_rotations.py [LENGTH ...] [--tokens 2048] [--json FILE]

By length of a vector: microseconds of the kernel with random signs (lqer/transforms/hadamard_kernel.py), of its inverse
and of the same transform as two products with matrices, each the fastest of five; and how far the kernel's values are
from those of the products, relative, in Frobenius norm. A length that does not fit the kernel has times of products
alone. Prints a table as markdown. Exit status: 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measures.seconds import least_seconds
from torch import Tensor

from lqer.report.environment import device_name
from lqer.transforms.hadamard import hadamard, random_hadamard
from lqer.transforms.hadamard_kernel import fits

LENGTHS = (1536, 4096, 8960, 11008, 14336)
REPEATS = 5


@torch.inference_mode()
def time_rotation(tokens: int, length: int, device: torch.device) -> dict[str, float]:
    """Microseconds by way, and "difference" of the kernel from the products."""
    x_TI = torch.randn(tokens, length, device=device, dtype=torch.bfloat16)
    rotation = random_hadamard(length, length, 0).to(torch.bfloat16).on(device)

    def by_products() -> Tensor:
        return hadamard(x_TI * rotation.input_signs_I)

    found = {"products": _microseconds(by_products, device)}
    if not fits(length):
        return found
    expected_TI, y_TI = by_products().float(), rotation.input(x_TI).float()
    return found | {
        "kernel": _microseconds(lambda: rotation.input(x_TI), device),
        "back": _microseconds(lambda: rotation.output(x_TI), device),
        "difference": float((y_TI - expected_TI).norm() / expected_TI.norm()),
    }


def _microseconds(work: Callable[[], object], device: torch.device) -> float:
    return 1e6 * least_seconds(work, REPEATS, device)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengths", nargs="*", type=int, metavar="LENGTH", default=LENGTHS)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: benchmark_rotations.py needs an NVIDIA GPU, and torch finds none here", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    print(f"{device_name(device)}, torch {torch.__version__}\n")
    print("| tokens x length | kernel | kernel back | two products | kernel against products |\n|---|---|---|---|---|")
    rows = []
    for length in arguments.lengths:
        found = time_rotation(arguments.tokens, length, device)
        times = [f"{found[way]:.0f} us" if way in found else "" for way in ("kernel", "back", "products")]
        difference = f"{found['difference']:.1e}" if "difference" in found else ""
        print(f"| {arguments.tokens} x {length} | {' | '.join(times)} | {difference} |".replace("|  |", "| |"))
        rows.append({"length": length, **found})
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
