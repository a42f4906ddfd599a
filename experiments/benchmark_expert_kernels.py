"""Microseconds of a layer's experts: the kernels on packed codes beside transformers' own on bfloat16, in one process.

    python experiments/benchmark_expert_kernels.py [--shape 128 2048 768 8] [--tokens 1 4 16]
        [--formats int4 mxint4-w4a8] [--launches] [--once] [--budget 30]

--shape: experts, hidden size, intermediate size, experts of a token. Every call is a CUDA graph, its weights are not in
the L2 cache: calls of one token take experts that no other call takes before all are taken; calls of several tokens
take random experts. "eager" synchronizes, so that it is timed as Python calls it. --launches tries launches of both
products, each alone. --once calls everything once, which compiles it, and times nothing. --budget: milliseconds of one
measurement. Weights are random.

Shapes: T tokens, K experts of a token, E experts, D hidden size, F intermediate size.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from kernel_benchmark import timing
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lqer.formats import Int, MXInt, NumberFormat
from lqer.kernels import GroupedExperts, PackedExperts, PackedLinear
from lqer.kernels.experts.launch import run_down, run_up
from lqer.kernels.experts.reference import reference_down, reference_up
from lqer.kernels.tuning import GemmLaunch
from lqer.report.environment import device_name

DTYPE, DEVICE = torch.bfloat16, torch.device("cuda")
Route = tuple[Tensor, Tensor]
Times = dict[str, float]


@dataclass(frozen=True)
class Scheme:
    weight: NumberFormat
    rank: int = 0
    activation: NumberFormat | None = None


SCHEMES = {
    "int4": Scheme(Int(4, 128)),
    "int3": Scheme(Int(3, 128)),
    "mxint4": Scheme(MXInt(4)),
    "int4-r32": Scheme(Int(4, 128), 32),
    "mxint4-w4a8": Scheme(MXInt(4), 32, MXInt(8)),
}
# Launches to try: of integer groups, and of other codes.
GROUPED = [
    *(GemmLaunch(block_n, 8, 1, 3, 4) for block_n in (16, 32, 64, 128)),
    *(GemmLaunch(block_n, 8, 1, 3, 8) for block_n in (16, 32, 64)),
    *(GemmLaunch(block_n, 16, 1, 3, warps) for block_n, warps in ((64, 4), (128, 4), (64, 8))),
]
CODES = [
    *(GemmLaunch(128, 16, splits, 3, 4) for splits in (1, 2, 4)), GemmLaunch(128, 16, 1, 3, 8),
    *(GemmLaunch(64, 16, splits, 3, 4) for splits in (1, 2)),
]  # fmt: skip
# Of several tokens, with different experts.
CALLS = 6
# batched_mm copies an expert for every pair: no more than so many of each.
MOST_COPIES = 4
# As many different experts as a stack repeats, so that packing does not take long.
DIFFERENT = 4


@dataclass(frozen=True)
class Shape:
    experts: int
    hidden: int
    intermediate: int
    of_token: int

    def packed(self, scheme: Scheme) -> GroupedExperts:
        up = self._stack(scheme, self.intermediate, self.hidden, 2)
        return GroupedExperts(up, self._stack(scheme, self.hidden, self.intermediate, 1), "silu")

    def _stack(self, scheme: Scheme, n: int, k: int, halves: int) -> PackedExperts:
        def linear() -> PackedLinear:
            weight = scheme.weight.quantize(torch.randn(n, k, device=DEVICE) * k**-0.5)
            a = b = None
            if scheme.rank:
                a = MXInt(8).quantize(torch.randn(k, scheme.rank, device=DEVICE) * k**-0.5, axis=0)
                b = MXInt(8).quantize(torch.randn(scheme.rank, n, device=DEVICE) * 0.1, axis=0)
            return PackedLinear.pack(weight, a, b, None, scheme.activation, DTYPE)

        different = [[linear() for _ in range(halves)] for _ in range(DIFFERENT)]
        return PackedExperts.stack([different[e % DIFFERENT] for e in range(self.experts)])

    def theirs(self) -> nn.Module:
        config = Qwen3MoeConfig(
            hidden_size=self.hidden, moe_intermediate_size=self.intermediate, num_experts=self.experts,
            num_experts_per_tok=self.of_token,
        )  # fmt: skip
        config._experts_implementation = "grouped_mm"
        with DEVICE:
            module = Qwen3MoeExperts(config).to(DTYPE)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=self.hidden**-0.5)
        return module.requires_grad_(False)

    def routes(self, tokens: int) -> list[Route]:
        """Experts and weights of some calls."""
        if tokens == 1:
            calls = self.experts // self.of_token
            each = torch.randperm(self.experts, device=DEVICE)[: calls * self.of_token].view(calls, 1, self.of_token)
        else:
            each = torch.rand(CALLS, tokens, self.experts, device=DEVICE).topk(self.of_token).indices
        return [(index_TK, torch.rand(index_TK.shape, device=DEVICE, dtype=DTYPE)) for index_TK in each]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=4, default=[128, 2048, 768, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--formats", nargs="+", choices=SCHEMES, default=[*SCHEMES])
    parser.add_argument("--launches", action="store_true")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--budget", type=float, default=30)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    torch.manual_seed(0)
    shape = Shape(*given.shape)
    measure = once if given.once else timed(given.budget)
    print(f"{device_name(DEVICE)}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; {shape}")
    packed = {name: shape.packed(SCHEMES[name]) for name in given.formats}
    compare(shape, packed, measure, given.tokens, None if given.once else shape.theirs())
    if given.launches:
        for name, grouped in packed.items():
            compare_launches(shape, name, grouped, measure, given.tokens)


def compare(
    shape: Shape,
    packed: dict[str, GroupedExperts],
    measure: Callable[[Sequence[Callable[[], Any]]], float],
    tokens_of_runs: Sequence[int],
    theirs: nn.Module | None,
) -> None:
    """A row for each number of tokens; their times, and ours also as a share of their best."""
    print("| tokens | transformers, us | " + " | ".join(f"{name}, us (share, error)" for name in packed) + " |")
    print("|---" * (2 + len(packed)) + "|", flush=True)
    for tokens in tokens_of_runs:
        x_TD, routes = torch.randn(tokens, shape.hidden, device=DEVICE, dtype=DTYPE), shape.routes(tokens)
        of_theirs = {} if theirs is None else dict(times_of_theirs(theirs, x_TD, routes, measure))
        best = min(of_theirs.values(), default=float("nan"))
        cells = []
        for grouped in packed.values():
            us = measure([partial(grouped, x_TD, *route, nothing) for route in routes])
            cells.append(f"{us:.1f} ({us / best:.2f}, {error_of(grouped, x_TD, routes[0]):.1e})")
        shown = ", ".join(f"{name} {us:.1f}" for name, us in of_theirs.items())
        print(f"| {tokens} | {shown} | {' | '.join(cells)} |", flush=True)


def times_of_theirs(
    theirs: nn.Module, x_TD: Tensor, routes: Sequence[Route], measure: Callable[[Sequence[Callable[[], Any]]], float]
) -> Iterator[tuple[str, float]]:
    pairs, experts = routes[0][0].numel(), len(theirs.gate_up_proj)  # type: ignore[arg-type]
    for name in ("grouped_mm", "batched_mm", "eager"):
        if name == "batched_mm" and pairs > MOST_COPIES * experts:
            continue
        theirs.config._experts_implementation = name  # type: ignore[union-attr]
        calls = [partial(theirs, x_TD, *route) for route in routes]
        try:
            yield name, in_python(calls) if name == "eager" else measure(calls)
        except RuntimeError as error:
            print(f"{name} failed: {str(error).splitlines()[0]}")


def compare_launches(
    shape: Shape,
    name: str,
    grouped: GroupedExperts,
    measure: Callable[[Sequence[Callable[[], Any]]], float],
    tokens_of_runs: Sequence[int],
) -> None:
    """Of each product, with what surrounds it, the launches by their time: block_n, block_m, warps, splits."""
    up, down = grouped.up.packed, grouped.down.packed
    for tokens in tokens_of_runs:
        x_TD, routes = torch.randn(tokens, shape.hidden, device=DEVICE, dtype=DTYPE), shape.routes(tokens)
        of_up: Times = {}
        of_down: Times = {}
        for launch in GROUPED if isinstance(SCHEMES[name].weight, Int) else CODES:
            key = f"n{launch.block_n}m{launch.block_m}w{launch.warps}s{launch.splits}"
            ups = [partial(run_up, x_TD, index_TK, up, down.spec, "silu", launch) for index_TK, _ in routes]
            downs = [
                partial(run_down, *made(), *route, down, up.spec, True, launch)
                for made, route in zip(ups, routes, strict=True)
            ]
            of_up[key], of_down[key] = measure(ups), measure(downs)
        for product, times in (("up", of_up), ("down", of_down)):
            ordered = sorted(times.items(), key=lambda item: item[1])
            print(
                f"{name} {product} T={tokens}: " + "  ".join(f"{key} {us:.1f}" for key, us in ordered[:9]), flush=True
            )


def nothing(halves: Tensor) -> Tensor:
    raise AssertionError("the kernel computes the activation")


def error_of(grouped: GroupedExperts, x_TD: Tensor, route: Route) -> float:
    """|| y - reference || / || reference ||, the reference in plain torch."""
    up, down = grouped.up.packed, grouped.down.packed
    index_TK, weights_TK = route
    hidden, order_P, tiles_3P = reference_up(x_TD, index_TK, up, down.spec, "silu")
    expected = reference_down(hidden, order_P, tiles_3P, index_TK, weights_TK, down, up.spec, True).float()
    return float((grouped(x_TD, index_TK, weights_TK, nothing).float() - expected).norm() / expected.norm())


def timed(budget_ms: float) -> Callable[[Sequence[Callable[[], Any]]], float]:
    """Microseconds of a call, in a CUDA graph of all."""

    def measure(calls: Sequence[Callable[[], Any]]) -> float:
        for call in calls:
            call()
        rounds = timing.rounds_for(len(calls), 10)
        return timing.median_us(timing.graph_of(calls, rounds).replay, budget_ms) / (rounds * len(calls))

    return measure


def once(calls: Sequence[Callable[[], Any]]) -> float:
    """Call the first, which compiles it."""
    calls[0]()
    return float("nan")


def in_python(calls: Sequence[Callable[[], Any]]) -> float:
    """Microseconds of a call from Python."""
    return timing.median_us(timing.loop_of(calls, 1), 30) / len(calls)


if __name__ == "__main__":
    main()
