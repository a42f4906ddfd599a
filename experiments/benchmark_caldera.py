"""What CALDERA of one decoder block costs: seconds per linear, on random weights of some shape.

    python experiments/benchmark_caldera.py [--hidden 4096] [--intermediate 11008] [--rank 64] [--iterations 10]
        [--blocks 32] [--device cpu|cuda] [--parts] [--sweeps]

The settings are those of configs/methods/caldera.toml, the defaults the shape of Llama-2-7B. Linears of one input site
share its Hessian, as in a run. Before, one linear is quantized in one iteration, which compiles and is not counted.
--parts: what one iteration of down_proj spends its time on, by torch's profiler. --sweeps: instead of that, the time
that a GPU takes to find 2^21 nearest lattice points, and for LDLQ and GPTQ of a hidden x hidden weight, also block by
block and column by column.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from measures.seconds import least_seconds
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lqer.formats import E8P, MX, Int, NormalFloat
from lqer.formats.e8_search import nearest_e8p
from lqer.methods import Caldera, LinearPlan
from lqer.models.source import pick_device
from lqer.report.environment import device_name
from lqer.rounding import Ldlq
from lqer.rounding import gptq as gptq_module
from lqer.rounding import ldlq as ldlq_module
from lqer.rounding.gptq import gptq
from lqer.rounding.hessian import damp
from lqer.rounding.ldlq import ldlq
from lqer.rounding.ldlq_panel import block_by_block
from lqer.statistics.site import SiteStatistics
from lqer.transforms import Hadamard

SWEEPS = 3  # of which the fastest counts
PLAN = LinearPlan(
    method=Caldera(down_date=0.97),
    weight=E8P(2),
    rounding=Ldlq(),
    transform=Hadamard(),
    factor=E8P(4, "row", scale_dtype="float16"),
    factor_axis="outer",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--sweeps", action="store_true")
    arguments = parser.parse_args()
    device = pick_device(arguments.device or "auto")
    plan = replace(PLAN, rank=arguments.rank, iterations=arguments.iterations)
    hidden, intermediate = arguments.hidden, arguments.intermediate
    if arguments.sweeps:
        print(f"{device_name(device)}, torch {torch.__version__}\n")
        time_sweeps(hidden, device)
        return 0
    # Of each site, its inputs and the outputs of its linears.
    sites = [(hidden, [hidden] * 3), (hidden, [hidden]), (hidden, [intermediate] * 2), (intermediate, [hidden])]
    print(f"{device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads, {vars(arguments)}\n")
    print("| out x in | linears of the site | seconds | error of the best state |\n|---|---|---|---|")
    seconds_of(replace(plan, iterations=1), random_weights([hidden], hidden, device), random_site(hidden, device))
    total = 0.0
    for in_features, outputs in sites:
        weights, site = random_weights(outputs, in_features, device), random_site(in_features, device)
        seconds, errors = seconds_of(plan, weights, site)
        total += seconds
        print(f"| {outputs[0]}x{in_features} | {len(outputs)} | {seconds:.2f} | {errors[0]:.4f} |", flush=True)
    print(f"\n{total:.1f} s a block; {arguments.blocks} blocks: {arguments.blocks * total / 60:.1f} minutes")
    if arguments.parts:
        weights, site = random_weights([hidden], intermediate, device), random_site(intermediate, device)
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with profile(activities=kinds) as recorded:
            seconds_of(replace(plan, iterations=1), weights, site)
        order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(recorded.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))
    return 0


def time_sweeps(hidden: int, device: torch.device) -> None:
    points_V8 = torch.randn(1 << 21, 8, device=device)
    seconds, _ = least_seconds(lambda: nearest_e8p(points_V8), SWEEPS, device)
    print(f"2^21 vectors to the nearest E8P points: {1e3 * seconds:.2f} ms")
    (weight_OI,), site = random_weights([hidden], hidden, device), random_site(hidden, device)
    damped = damp(site["hessian"])
    for number_format in (E8P(2), Int(4, 128)):
        in_kernels, _ = least_seconds(partial(ldlq, weight_OI, damped, number_format), SWEEPS, device)
        with mock.patch.object(ldlq_module, "panel_rounding", return_value=block_by_block):
            by_block, _ = least_seconds(partial(ldlq, weight_OI, damped, number_format), SWEEPS, device)
        print(
            f"LDLQ of {hidden}x{hidden} in {number_format.kind}: {1e3 * in_kernels:.1f} ms in kernels, "
            f"{1e3 * by_block:.1f} ms block by block"
        )
    for scalar in (Int(4, 128), NormalFloat(4, 64), MX("mxfp4_e2m1")):
        in_kernels, _ = least_seconds(partial(gptq, weight_OI, damped, scalar), SWEEPS, device)
        with mock.patch.object(gptq_module, "_panel_in_one_kernel", gptq_module._panel_column_by_column):
            by_column, _ = least_seconds(partial(gptq, weight_OI, damped, scalar), 1, device)
        print(
            f"GPTQ of {hidden}x{hidden} in {scalar.kind}: {1e3 * in_kernels:.1f} ms in kernels, "
            f"{1e3 * by_column:.1f} ms column by column"
        )


def random_weights(outputs: list[int], in_features: int, device: torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(out_features, in_features, device=device) for out_features in outputs]


def random_site(in_features: int, device: torch.device) -> SiteStatistics:
    """E[x xᵀ] of correlated inputs."""
    torch.manual_seed(1)
    x_TI = torch.randn(in_features // 2, in_features, device=device) * torch.randn(in_features, device=device).exp()
    return SiteStatistics({"hessian": x_TI.T @ x_TI / len(x_TI) + 0.1 * torch.eye(in_features, device=device)})


def seconds_of(plan: LinearPlan, weights: list[Tensor], site: SiteStatistics) -> tuple[float, list[float]]:
    """Of all linears of a site, and the least relative error of each."""
    started = time.perf_counter()
    errors = [min(plan.quantize(weight_OI, site).errors) for weight_OI in weights]
    if weights[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started, errors


if __name__ == "__main__":
    sys.exit(main())
