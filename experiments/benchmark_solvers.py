"""What a low-rank reconstruction costs: this repository's solvers against the SVDs and square roots of the references.

    python experiments/benchmark_solvers.py [--device cpu|cuda] [--shapes 2048x5504 ...] [--qera-shapes 2048x1536 ...]
        [--rank 32] [--repeats 3] [--json FILE]

Shapes are out_features x in_features. Two tables, as markdown:

1. rounding errors of 4-bit MXINT under diagonal scales, "outlier" (one channel in a hundred 30 times the others, all of
   them times exp(0.3 N)), "spread" (exp(0.7 N)) and "flat" (exp(0.3 N)). Reference: the full SVD of the scaled error,
   torch.linalg.svd(full_matrices=True). Quality: the energy captured over the optimum's.
2. the same errors under a full Hessian R of correlated inputs. Reference: scipy's sqrtm of R, the SVD and a
   solve, as QERA computes it (left out where scipy is not installed). Quality: objective over the optimum's, less 1.

Variants alternate within a repeat; times are medians, ratios are medians of the repeats' own ratios. One thread per
core that the process may use; set OMP_NUM_THREADS for fewer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lqer.formats import MXInt
from lqer.lowrank.krylov_graphs import recorded_growth
from lqer.lowrank.metric import Metric
from lqer.lowrank.solver import Factors, reconstruct

try:
    from scipy.linalg import sqrtm
except ImportError:
    sqrtm = None

Product = tuple[Tensor, Tensor]
OUTLIER_SHARE, OUTLIER_SIZE = 0.01, 30.0
DIAGONAL_HEADER = (
    "out x in",
    "scales",
    "solver",
    "time (s)",
    "faster than the full SVD",
    "captured / optimum",
    "stated gap",
)
FULL_HEADER = ("out x in", "solver", "time (s)", "faster than sqrtm + SVD", "objective / optimum - 1", "stated gap")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="*", type=_shape, default=[(2048, 5504)])
    parser.add_argument("--qera-shapes", nargs="*", type=_shape, default=[(2048, 1536)])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, rank {arguments.rank}, {arguments.repeats} repeats\n", flush=True)
    # As in a run: on a GPU the first repeat records what the others play back.
    with recorded_growth():
        diagonal = [row for shape in arguments.shapes for row in diagonal_rows(shape, arguments, device)]
        if diagonal:
            print_table(DIAGONAL_HEADER, diagonal)
        full = [row for shape in arguments.qera_shapes for row in full_rows(shape, arguments, device)]
        if full:
            print_table(FULL_HEADER, full)
    if arguments.json:
        tables = {
            "device": name,
            "torch": torch.__version__,
            "rank": arguments.rank,
            "diagonal": diagonal,
            "full": full,
        }
        arguments.json.write_text(json.dumps(tables, indent=2) + "\n")
    return 0


def _shape(text: str) -> tuple[int, int]:
    out_features, _, in_features = text.partition("x")
    if not (out_features.isdigit() and in_features.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 2048x5504")
    return int(out_features), int(in_features)


def rounding_error(shape: tuple[int, int], generator: torch.Generator, device: torch.device) -> Tensor:
    weight_OI = (torch.randn(shape, generator=generator) * 0.02).to(device)
    return weight_OI - MXInt(bits=4).quantize(weight_OI).dequantize()


def diagonal_rows(shape: tuple[int, int], arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Every solver on one error under three kinds of scales."""
    generator = torch.Generator().manual_seed(0)
    error_OI = rounding_error(shape, generator, device)
    spread_I = torch.randn(shape[1], generator=generator)
    is_outlier_I = torch.rand(shape[1], generator=generator) < OUTLIER_SHARE
    scales = {
        "outlier": (0.3 * spread_I).exp() * torch.where(is_outlier_I, OUTLIER_SIZE, 1.0),
        "spread": (0.7 * spread_I).exp(),
        "flat": (0.3 * spread_I).exp(),
    }
    rows = []
    for kind, scale_cpu_I in scales.items():
        scale_I = scale_cpu_I.to(device)
        metric, rank = Metric(scale_I=scale_I), arguments.rank
        scaled_IO = (error_OI * scale_I).T.double()

        def full_svd(scale_I: Tensor = scale_I, rank: int = rank) -> Product:
            u_II, sigma_K, vt_OO = torch.linalg.svd(scale_I[:, None] * error_OI.T, full_matrices=True)
            return u_II[:, :rank] / scale_I[:, None], sigma_K[:rank, None] * vt_OO[:rank]

        solvers: dict[str, Callable[[], Product | Factors]] = {
            "svd(full_matrices=True)": full_svd,
            "exact": lambda metric=metric: reconstruct(error_OI, metric, arguments.rank, "exact"),  # type: ignore[misc]
            "krylov": lambda metric=metric: reconstruct(error_OI, metric, arguments.rank, "krylov"),  # type: ignore[misc]
        }
        measured = measure(solvers, arguments.repeats, device)

        def captured(product: Product, scaled_IO: Tensor = scaled_IO, scale_I: Tensor = scale_I) -> float:
            a_IR, b_RO = product
            left_IO = scaled_IO - (a_IR.double() * scale_I.double()[:, None]) @ b_RO.double()
            return float(scaled_IO.square().sum() - left_IO.square().sum())

        optimum = captured(measured["exact"]["product"])
        for solver, found in measured.items():
            rows.append(
                {
                    "shape": f"{shape[0]}x{shape[1]}", "scales": kind, "solver": solver, "seconds": found["seconds"],
                    "ratio": found["ratio"], "quality": captured(found["product"]) / optimum, "gap": found["gap"],
                }
            )  # fmt: skip
    return rows


def full_rows(shape: tuple[int, int], arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Every solver on one error under a full R."""
    generator = torch.Generator().manual_seed(0)
    error_OI = rounding_error(shape, generator, device)
    n = shape[1]
    mixing_II = torch.randn(n, n, generator=generator) / n**0.5
    channel_I = (0.7 * torch.randn(n, generator=generator)).exp()
    x_TI = torch.randn(4 * n, n, generator=generator) @ (torch.eye(n) + 0.5 * mixing_II) * channel_I
    r_II = (x_TI.T @ x_TI / len(x_TI)).to(device)
    r64_II = r_II.double()
    metric, rank = Metric(hessian_II=r_II), arguments.rank

    def reference() -> Product:
        root = sqrtm(r64_II.cpu().numpy())
        root_II = torch.from_numpy(root.real if root.dtype.kind == "c" else root).to(device, torch.float32)
        u_II, sigma_K, vt_OO = torch.linalg.svd(root_II @ error_OI.T, full_matrices=True)
        return torch.linalg.solve(root_II, u_II[:, :rank]), sigma_K[:rank, None] * vt_OO[:rank]

    solvers: dict[str, Callable[[], Product | Factors]] = {} if sqrtm is None else {"sqrtm + svd + solve": reference}
    solvers["exact"] = lambda: reconstruct(error_OI, metric, rank, "exact")
    solvers["krylov"] = lambda: reconstruct(error_OI, metric, rank, "krylov")
    measured = measure(solvers, arguments.repeats, device)

    def objective(product: Product) -> float:
        left_IO = error_OI.T.double() - product[0].double() @ product[1].double()
        return float((left_IO * (r64_II @ left_IO)).sum())

    optimum = objective(measured["exact"]["product"])
    return [
        {
            "shape": f"{shape[0]}x{shape[1]}", "solver": solver, "seconds": found["seconds"], "ratio": found["ratio"],
            "quality": objective(found["product"]) / optimum - 1, "gap": found["gap"],
        }
        for solver, found in measured.items()
    ]  # fmt: skip


def measure(
    solvers: dict[str, Callable[[], Product | Factors]], repeats: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Median seconds of each, and the median of the first one's seconds over its own within a repeat."""
    times: dict[str, list[float]] = {name: [] for name in solvers}
    results: dict[str, Product | Factors] = {}
    for repeat in range(repeats + 1):
        for name, solve in solvers.items():
            if repeat == 0 and name == next(iter(solvers)) and device.type == "cpu":
                continue  # the first repeat warms up; on a CPU the references need none
            _synchronize(device)
            started = time.perf_counter()
            results[name] = solve()
            _synchronize(device)
            if repeat > 0:
                times[name].append(time.perf_counter() - started)
    reference = times[next(iter(solvers))]
    measured = {}
    for name, result in results.items():
        found = isinstance(result, Factors)
        measured[name] = {
            "seconds": statistics.median(times[name]),
            "ratio": statistics.median(a / b for a, b in zip(reference, times[name], strict=True)),
            "product": (result.a_IR, result.b_RO) if isinstance(result, Factors) else result,
            "gap": result.gap if found and isinstance(result, Factors) else None,
        }
    return {name: measured[name] for name in solvers}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def print_table(header: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|---" * len(header) + "|")
    for row in rows:
        quality = f"{row['quality']:.6f}" if "scales" in row else f"{row['quality']:.1e}"
        gap = "–" if row["gap"] is None else f"{row['gap']:.1e}"
        cells = [row["shape"], *([row["scales"]] if "scales" in row else []), row["solver"]]
        cells += [f"{row['seconds']:.4f}", f"{row['ratio']:.1f}x", quality, gap]
        print("| " + " | ".join(cells) + " |")
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
