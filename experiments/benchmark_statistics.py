"""What E[x xᵀ] of one input site costs to gather and to factor, beside plain arithmetic for the same.

    python experiments/benchmark_statistics.py [--features 4096 11008] [--tokens 65536] [--batch 4096]
        [--device cpu|cuda] [--dtype bfloat16] [--linears 3] [--repeats 3] [--factors-only]

Two tables as markdown. "gather" is the project's accumulator, "plain" adds the float32 products of every 512 tokens to
a float64 sum in PyTorch; errors are the largest of all entries, relative to sqrt(S_ii S_jj), against float64 sums, with
inputs whose channels have scales exp(N). "factor" is what GPTQ runs on, U with Uᵀ U = H⁻¹, made once for all
`--linears` of a site, "plain" is damping, factoring and inverting it in PyTorch for each of them; peak is GPU memory,
the statistic itself included. Times are the least of the repeats, after a run that compiles. --factors-only: of wide
sites, for which the plain way has no room.
"""

from __future__ import annotations

import argparse
import sys

import torch
from measures.seconds import least_seconds
from torch import Tensor

from lqer.rounding.factor import feedback_factor
from lqer.rounding.hessian import DampedHessian
from lqer.statistics import Hessian
from lqer.statistics.products import CHUNK_TOKENS
from lqer.store.offload import Offload

DAMPING = 0.01
NONE_SAMPLED = torch.empty(0, dtype=torch.int64)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", nargs="+", type=int, default=[4096, 11008])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--linears", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--factors-only", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}, {arguments.dtype}\n")
    if not arguments.factors_only:
        print("| in_features | tokens | gather (s) | error | plain (s) | error |")
        print("|" + "---|" * 6)
        for features in arguments.features:
            print("| " + " | ".join(gathering(features, arguments, device)) + " |", flush=True)
        print()
    print("| in_features | linears | factor (s) | peak (GB) | plain (s) | peak (GB) |")
    print("|" + "---|" * 6)
    for features in arguments.features:
        print("| " + " | ".join(factoring(features, arguments, device)) + " |", flush=True)
    return 0


def gathering(features: int, arguments: argparse.Namespace, device: torch.device) -> list[str]:
    generator = torch.Generator(device).manual_seed(0)
    scale_I = torch.randn(features, generator=generator, device=device).exp()
    x_TI = torch.randn(arguments.tokens, features, generator=generator, device=device)
    x_TI = (x_TI * scale_I).to(getattr(torch, arguments.dtype))

    def gathered() -> Tensor:
        accumulator = Hessian().accumulator(features, device, Offload())
        for x_NI in x_TI.split(arguments.batch):
            accumulator.add(x_NI, None, NONE_SAMPLED)
        return accumulator.result()

    exact_II = torch.zeros(features, features, dtype=torch.float64, device=device)
    for x_NI in x_TI.split(arguments.batch):
        exact_II.addmm_(x_NI.T.double(), x_NI.double(), alpha=1 / arguments.tokens)
    root_I = exact_II.diagonal().sqrt()
    cells = [str(features), str(arguments.tokens)]
    for way in (gathered, lambda: plainly_gathered(x_TI)):
        seconds, found_II = least_seconds(way, arguments.repeats, device)
        error = float(((found_II - exact_II).abs_() / root_I / root_I[:, None]).max())
        cells += [f"{seconds:.4f}", f"{error:.1e}"]
    return cells


def plainly_gathered(x_TI: Tensor) -> Tensor:
    """Every 512 tokens in float32, then in float64."""
    sum_II = torch.zeros(x_TI.shape[1], x_TI.shape[1], dtype=torch.float64, device=x_TI.device)
    for x_NI in x_TI.split(CHUNK_TOKENS):
        if x_NI.is_cuda and x_NI.dtype != torch.float32:
            sum_II += torch.mm(x_NI.T, x_NI, out_dtype=torch.float32)
        else:
            sum_II += x_NI.float().T @ x_NI.float()
    return sum_II.div_(len(x_TI)).float()


def factoring(features: int, arguments: argparse.Namespace, device: torch.device) -> list[str]:
    generator = torch.Generator(device).manual_seed(0)
    x_TI = torch.randn(1024, features, generator=generator, device=device)
    hessian_II = (x_TI.T @ x_TI).div_(len(x_TI))
    hessian_II.diagonal().add_(0.1)
    del x_TI

    def shared() -> None:
        damped = DampedHessian(hessian_II, DAMPING)
        for _ in range(arguments.linears):
            damped.derived(feedback_factor, False)

    def plain() -> None:
        for _ in range(arguments.linears):
            plainly_factored(hessian_II)

    cells = [str(features), str(arguments.linears)]
    for way in (shared,) if arguments.factors_only else (shared, plain):
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds, _ = least_seconds(way, arguments.repeats, device)
        peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if device.type == "cuda" else "–"
        cells += [f"{seconds:.3f}", peak]
    return cells + ["–"] * (6 - len(cells))


def plainly_factored(hessian_II: Tensor) -> Tensor:
    """U in float32, H once more factored to see that it is positive definite."""
    identity_II = torch.eye(len(hessian_II), dtype=torch.float64, device=hessian_II.device)
    damped_II = hessian_II.double() / hessian_II.diagonal().mean() + DAMPING * identity_II
    torch.linalg.cholesky_ex(damped_II)
    upper_II = torch.linalg.cholesky(damped_II.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(upper_II, identity_II, upper=True).float()


if __name__ == "__main__":
    sys.exit(main())
