"""One scene: its contenders are built, checked against float64 and timed alternately, with the same number of copies.

A contender that is not installed, fails or gives a wrong result is a measurement without a time, with the reason.

Shapes: M rows of x, I in_features, O out_features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernel_benchmark import timing
from kernel_benchmark.contenders import VARIANTS, Operands, Variant
from kernel_benchmark.results import Measurement, Scene

# H100 and H200 have L2 caches of 50 and 60 MB: a copy is no longer cached when it is used again.
ROTATED_BYTES = 300e6
FEWEST_COPIES, MOST_COPIES = 2, 40
REPETITIONS = 2
CHECKED_ROWS = 64  # float64 products are slow, and rows of x are independent
WARM_ROWS = 16  # with more rows a call is not limited by reading weights
LONGEST_PROBLEM = 200
DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class Settings:
    """Settings of all measurements of a run."""

    budget_ms: float  # of one contender and one repetition
    warm: bool  # also measure with one copy
    bytes_per_second: float
    operations_per_second: float


@dataclass
class _Ready:
    """A contender that passed its check: the functions to time, and how many calls one of them makes."""

    measurement: Measurement
    run: Callable[[], object]
    warm: Callable[[], object] | None
    calls: int
    copies: list[Any]  # kept alive, because a graph does not own the tensors that it reads


def describe(error: Exception) -> str:
    """One line for a table cell."""
    if isinstance(error, ImportError):
        return f"not installed: {error}"
    text = str(error).strip()
    first = text.splitlines()[0] if text else "no message"
    return f"{type(error).__name__}: {first}"[:LONGEST_PROBLEM].replace("|", "/")


def copies_for(scene: Scene, contenders: Sequence[str]) -> int:
    """Number of copies so that ROTATED_BYTES of the smallest weights are read between two uses of one copy."""
    smallest = min(VARIANTS[name].weight_bytes(scene.k, scene.n) for name in contenders)
    return max(FEWEST_COPIES, min(MOST_COPIES, math.ceil(ROTATED_BYTES / smallest)))


def relative_error(y: Tensor, reference: Tensor) -> float:
    """||y - reference|| / ||reference|| in float64."""
    return float((y.double() - reference).norm() / reference.norm())


def try_once(scene: Scene, name: str) -> None:
    """Build one contender and call it once, which compiles and tunes it."""
    operands = Operands(scene.k, scene.n, DEVICE)
    contender = VARIANTS[name].make(operands, VARIANTS[name], scene.m)
    contender.run(contender.state, operands.input(scene.m))
    torch.cuda.synchronize()


def run_scene(
    scene: Scene, contenders: Sequence[str], settings: Settings, known_problems: Mapping[str, str]
) -> list[Measurement]:
    """A measurement of every contender, in the given order. Contenders with a known problem are not run."""
    operands = Operands(scene.k, scene.n, DEVICE)
    x_MI = operands.input(scene.m)
    copies = copies_for(scene, contenders)
    done: dict[str, Measurement] = {}
    ready: dict[str, _Ready] = {}
    for name in contenders:
        done[name] = Measurement(scene, name, VARIANTS[name].label)
        if name in known_problems:
            done[name] = replace(done[name], problem=known_problems[name])
            continue
        try:
            ready[name] = _prepare(operands, done[name], x_MI, copies, settings)
        except Exception as error:  # no error of a contender may stop the others
            done[name] = replace(done[name], problem=describe(error))
    times: dict[str, list[float]] = {name: [] for name in ready}
    warm_times: dict[str, float] = {}
    for repetition in range(REPETITIONS):
        for name, item in list(ready.items()):
            try:
                times[name].append(timing.median_us(item.run, settings.budget_ms) / item.calls)
                if item.warm is not None and repetition == 0:
                    warm_times[name] = timing.median_us(item.warm, settings.budget_ms) / item.calls
            except Exception as error:
                done[name] = replace(done[name], problem=describe(error))
                del ready[name]
    for name, item in ready.items():
        mean = sum(times[name]) / REPETITIONS
        done[name] = replace(
            item.measurement,
            microseconds=mean,
            spread=(max(times[name]) - min(times[name])) / mean,
            warm_microseconds=warm_times.get(name),
        )
    return list(done.values())


def _prepare(operands: Operands, blank: Measurement, x_MI: Tensor, copies: int, settings: Settings) -> _Ready:
    variant = VARIANTS[blank.contender]
    contender = variant.make(operands, variant, blank.scene.m)
    error = checked_error(operands, variant, contender.run(contender.state, x_MI), x_MI)
    states = copies_of(contender.state, copies, variant.weight_bytes(operands.k, operands.n))
    calls = [partial(contender.run, state, x_MI) for state in states]
    for call in calls:
        call()
    floor = variant.floor_us(blank.scene, settings.bytes_per_second, settings.operations_per_second)
    rounds = timing.rounds_for(copies, floor)
    measurement = replace(blank, error=error, floor_microseconds=floor, copies=copies)
    total = copies * rounds
    if variant.eager:
        return _Ready(measurement, timing.loop_of(calls, rounds), None, total, states)
    run = timing.graph_of(calls, rounds).replay
    warm = None
    if settings.warm and blank.scene.m <= WARM_ROWS:
        warm = timing.graph_of(calls[:1], total).replay
    return _Ready(measurement, run, warm, total, states)


def checked_error(operands: Operands, variant: Variant, y_MO: Tensor, x_MI: Tensor) -> float:
    """The relative error of the first and the last rows. Raises ValueError above the variant's tolerance."""
    m = x_MI.shape[0]
    rows = list(range(m)) if m <= CHECKED_ROWS else [*range(CHECKED_ROWS // 2), *range(m - CHECKED_ROWS // 2, m)]
    error = relative_error(y_MO[rows], operands.reference(variant, x_MI[rows]))
    if not error <= variant.tolerance:
        raise ValueError(f"wrong result: relative error {error:.2g} is above {variant.tolerance:g}")
    return error


def copies_of(state: Any, copies: int, weight_bytes: float) -> list[Any]:
    """The state and deep copies of it. Raises RuntimeError if the copies share memory."""
    before = torch.cuda.memory_allocated()
    states = [state, *(copy.deepcopy(state) for _ in range(copies - 1))]
    taken = torch.cuda.memory_allocated() - before
    # Peers store slightly more or less than the format's nominal bits.
    if taken < 0.9 * (copies - 1) * weight_bytes:
        raise RuntimeError(f"{copies - 1} copies of {weight_bytes / 1e6:.1f} MB took {taken / 1e6:.1f} MB: they share")
    return states
