"""Measurements and the bars that they must reach: records and arithmetic, without torch.

A ratio is our time over theirs, below 1 if we are faster. Bars with `times_faster` use the inverse: 5 is five times
faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Scene(NamedTuple):
    """A product x (m, k) times W^T (k, n)."""

    k: int
    n: int
    m: int


@dataclass(frozen=True)
class Measurement:
    """One contender in one scene; times are per call."""

    scene: Scene
    contender: str
    label: str
    microseconds: float | None = None  # mean of the repetitions' medians, weights not in the L2 cache
    spread: float | None = None  # (slowest - fastest repetition) / microseconds
    warm_microseconds: float | None = None  # with one copy of the weights, mostly in the L2 cache
    error: float | None = None  # ||y - y64|| / ||y64||, with y64 the same formula in float64
    floor_microseconds: float | None = None  # bytes / copy bandwidth or operations / matmul rate, whichever is longer
    copies: int | None = None
    problem: str | None = None  # the reason if there is no time


Key = tuple[Scene, str]


@dataclass(frozen=True)
class Bar:
    """`ours` against a contender in each scene: the geometric mean must reach `at_least` and should reach `aim`."""

    group: str
    label: str
    ours: str
    against: tuple[tuple[Scene, str], ...]
    at_least: float | None = None
    aim: float | None = None
    times_faster: bool = False


@dataclass(frozen=True)
class BarResult:
    """A bar and its measurements; verdict: aim, pass, short, no bar or not measured."""

    group: str
    label: str
    against: str
    verdict: str
    microseconds: float | None = None  # geometric means over the scenes
    against_microseconds: float | None = None
    ratio: float | None = None
    worst: float | None = None  # the ratio of our worst scene
    at_least: float | None = None
    aim: float | None = None
    times_faster: bool = False
    problem: str | None = None


def geometric_mean(values: Iterable[float]) -> float:
    """exp(mean(log v)). Raises ValueError for no values and for a value that is not positive."""
    values = list(values)
    if not values or min(values) <= 0:
        raise ValueError(f"a geometric mean needs positive values, found {values}")
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def judge(ratio: float, at_least: float | None, aim: float | None, times_faster: bool) -> str:
    """The verdict on a ratio; a bar is an upper bound, or a lower bound with `times_faster`."""
    if at_least is None:
        return "no bar"

    def reached(bar: float) -> bool:
        return ratio >= bar if times_faster else ratio <= bar

    if aim is not None and reached(aim):
        return "aim"
    return "pass" if reached(at_least) else "short"


def evaluate(bar: Bar, measurements: Mapping[Key, Measurement], labels: Mapping[str, str]) -> BarResult:
    """The bar's verdict; "not measured", with the first reason, unless both sides have a time in every scene."""
    against = " / ".join(dict.fromkeys(labels[contender] for _, contender in bar.against))
    ours: list[float] = []
    theirs: list[float] = []
    for scene, opponent in bar.against:
        for contender, times in ((bar.ours, ours), (opponent, theirs)):
            measurement = measurements.get((scene, contender))
            if measurement is None or measurement.microseconds is None:
                reason = "not run" if measurement is None else measurement.problem
                where = f"{labels[contender]}, {scene.k}x{scene.n}, M={scene.m}: {reason}"
                return BarResult(
                    bar.group, bar.label, against, "not measured", at_least=bar.at_least, aim=bar.aim,
                    times_faster=bar.times_faster, problem=where,
                )  # fmt: skip
            times.append(measurement.microseconds)
    return compare(bar, ours, theirs, against)


def compare(bar: Bar, ours: Sequence[float], theirs: Sequence[float], against: str) -> BarResult:
    """The bar's verdict on times in microseconds, one per side and scene."""
    if bar.times_faster:
        ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
        worst = min(ratios)
    else:
        ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
        worst = max(ratios)
    ratio = geometric_mean(ratios)
    return BarResult(
        bar.group,
        bar.label,
        against,
        judge(ratio, bar.at_least, bar.aim, bar.times_faster),
        geometric_mean(ours),
        geometric_mean(theirs),
        ratio,
        worst,
        bar.at_least,
        bar.aim,
        bar.times_faster,
    )
