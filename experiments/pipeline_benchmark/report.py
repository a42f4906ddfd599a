"""The table of one run: seconds of every phase beside its floor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline_benchmark.floors import Floor

# In the order of the work; whatever else a run has opened comes after them.
PHASES = (
    "imports", "checks", "fingerprint", "texts", "read", "forward", "statistics", "exchange", "backward", "widths",
    "factor", "round", "reconstruct", "errors and spectra", "pack", "write", "hash", "verify", "load", "evaluate",
    "report",
)  # fmt: skip
HEADER = ("phase", "seconds", "in other threads", "floor", "times the floor", "the floor is")


@dataclass(frozen=True)
class Measured:
    """Seconds by phase, of the main thread and of the others beside it; wall: of the whole process."""

    main: Mapping[str, float]
    background: Mapping[str, float]
    wall: float


def table(
    measured: Measured, floors: Mapping[str, Floor], whole: Mapping[str, Floor] | None = None, blocks: int | None = None
) -> Iterator[str]:
    """The lines of a Markdown table. The main thread's seconds, and those of no phase, add up to the wall clock's.

    whole: the floors of a model of so many blocks, for a column that scales every phase as its floor.
    """
    more = [] if whole is None else [f"of {blocks} blocks"]
    yield _row([*HEADER, *more])
    yield "|---|" + "---:|" * 4 + "---|" + "---:|" * len(more)
    others = sorted({*measured.main, *measured.background} - {*PHASES})
    total = rest = measured.wall - sum(measured.main.values())
    for name in (*PHASES, *others):
        seconds, beside, floor = measured.main.get(name, 0.0), measured.background.get(name, 0.0), floors.get(name)
        if not seconds and not beside:
            continue
        cells = [name, f"{seconds:.2f}", f"{beside:.2f}" if beside else ""]
        times = seconds / floor.seconds if floor is not None and floor.seconds else 0.0
        cells += ["", "", ""] if floor is None else [_short(floor.seconds), f"{times:.1f}", floor.of]
        scaled = seconds if whole is None or floor is None else times * whole[name].seconds
        total += scaled
        yield _row([*cells, *(f"{scaled:.1f}" for _ in more)])
    yield _row(["in no phase", f"{rest:.2f}", "", "", "", "", *(f"{rest:.1f}" for _ in more)])
    lowest = sum(floor.seconds for floor in floors.values())
    cells = ["wall clock", f"{measured.wall:.2f}", "", _short(lowest), f"{measured.wall / lowest:.1f}", "their sum"]
    yield _row([*cells, *(f"{total:.1f}" for _ in more)])


def _short(seconds: float) -> str:
    return f"{seconds:.2g}" if seconds < 1 else f"{seconds:.1f}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
