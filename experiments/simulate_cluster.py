"""How long a sweep or a run would take on so many GPUs, by the schedule of [cluster] and assumed minutes of each job.

    python experiments/simulate_cluster.py

Nothing is measured: the order in which jobs start is that of lqer.jobs.graph.Schedule, which a cluster runs; how long
each takes is assumed, as the first tables say. Prints the tables of docs/cluster.md.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lqer.jobs.graph import Job, Schedule

# How many runs, and minutes of one checkpoint of a model of 7B parameters on one H100, estimated from single layers.
SCHEMES = {
    "lqer, qera": (160, 1.5),
    "gptq": (50, 3.5),
    "gptvq": (30, 12.0),
    "caldera": (30, 85.0),
    "tesseraq": (30, 115.0),
}
CALIBRATIONS, CALIBRATION = 2, 1.0
# Baselines without low-rank factors, which several runs share.
PLAIN, PLAIN_MINUTES = 12, 1.5
# All texts and tasks of one model.
EVALUATION = 10.0

# The shape of Llama 405B: blocks, and minutes on one GPU with memory enough.
BLOCKS = 126
CALIBRATION_405B = 15.0
EVALUATION_405B = 9.0
# 812 GB of weights at 6 GB/s.
READING_405B = 812 / 6 / 60
# Of packed weights of 4 bits.
READING_PACKED_405B = READING_405B / 4
METHODS_405B = {"quip-sharp": 13 * 60.0, "caldera, least": 19 * 60.0, "caldera, most": 96 * 60.0}
PARTS = 64
GPUS = (1, 8, 64)


@dataclass(frozen=True)
class Outcome:
    """minutes: until the last job ends. busy: the part of all workers' time that is work."""

    minutes: float
    busy: float


def job(name: str, minutes: float, needs: Sequence[str] = ()) -> Job:
    return Job(name, (), tuple(needs), lambda store: None, 60 * minutes)


def simulate(jobs: Sequence[Job], workers: int, knows_lengths: bool = True) -> Outcome:
    """Hand out jobs as a cluster does. knows_lengths: else they start in the order given."""
    length = {one.name: one.seconds / 60 for one in jobs}
    schedule = Schedule(jobs if knows_lengths else [job(one.name, 0.0, one.needs) for one in jobs])
    running: list[tuple[float, str]] = []
    now = 0.0
    while not schedule.is_over:
        for name in schedule.ready()[: workers - len(running)]:
            schedule.start(name)
            heapq.heappush(running, (now + length[name], name))
        now, ended = heapq.heappop(running)
        schedule.finish(ended)
    work = sum(length[name] for name in schedule.jobs)
    return Outcome(now, work / (now * workers))


def atlas(shared: bool) -> list[Job]:
    """300 runs. shared: what they have in common is one job; else each run makes all of it."""
    return list(_atlas(shared))


def _atlas(shared: bool) -> Iterator[Job]:
    if shared:
        yield from (job(f"calibrate {index}", CALIBRATION) for index in range(CALIBRATIONS))
        yield job("evaluate original", EVALUATION)
        for index in range(PLAIN):
            yield job(f"plain {index}", PLAIN_MINUTES, [f"calibrate {index % CALIBRATIONS}"])
            yield job(f"evaluate plain {index}", EVALUATION, [f"plain {index}"])
    for kind, (runs, minutes) in SCHEMES.items():
        for index in range(runs):
            name = f"{kind} {index}"
            if shared:
                yield job(name, minutes, [f"calibrate {index % CALIBRATIONS}"])
                yield job(f"evaluate {name}", EVALUATION, [name])
            else:
                yield job(name, CALIBRATION + minutes + PLAIN_MINUTES + 3 * EVALUATION)


def large_run(minutes: float) -> list[Job]:
    """One run of 405B parameters in parts of its blocks, evaluated block by block beside the original."""
    sizes = [(part + 1) * BLOCKS // PARTS - part * BLOCKS // PARTS for part in range(PARTS)]
    parts = [job(f"part {part}", minutes * size / BLOCKS, ["calibrate"]) for part, size in enumerate(sizes)]
    return [
        job("calibrate", max(CALIBRATION_405B, READING_405B)),
        *parts,
        job("evaluate quantized", EVALUATION_405B + READING_PACKED_405B, [one.name for one in parts]),
        job("evaluate original", EVALUATION_405B + READING_405B),
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def shown(minutes: float) -> str:
    return f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.0f} min"


def simulated(name: str, jobs: Sequence[Job], knows_lengths: bool = True) -> list[str]:
    """A row: hours, and how much of them is work, for each number of GPUs."""
    found = [simulate(jobs, count, knows_lengths) for count in GPUS]
    return [name, *(f"{shown(one.minutes)}, {one.busy:.0%} busy" for one in found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    counts = [f"{count} GPU{'s' if count > 1 else ''}" for count in GPUS]
    assumed = [[kind, str(runs), f"{minutes:g}"] for kind, (runs, minutes) in SCHEMES.items()]
    assumed += [["calibration", str(CALIBRATIONS), f"{CALIBRATION:g}"], ["baseline", str(PLAIN), f"{PLAIN_MINUTES:g}"]]
    assumed += [["evaluation of a model", str(300 + PLAIN + 1), f"{EVALUATION:g}"]]
    print(table(["7B parameters", "jobs", "assumed minutes on one H100"], assumed))
    rows = [
        simulated("nothing in common, in order", atlas(shared=False), knows_lengths=False),
        simulated("one graph, in the order written", atlas(shared=True), knows_lengths=False),
        simulated("one graph, longest first", atlas(shared=True)),
    ]
    print(table(["300 runs", *counts], rows))
    assumed = [["calibration", f"{CALIBRATION_405B:g}"]]
    assumed += [[f"{name}, {BLOCKS} blocks in {PARTS} parts", f"{minutes:g}"] for name, minutes in METHODS_405B.items()]
    assumed += [["evaluation of a model, and reading it", f"{EVALUATION_405B:g} + {READING_405B:.1f}"]]
    print(table(["405B parameters", "assumed minutes on one GPU with memory enough"], assumed))
    print(table(["one run", *counts], [simulated(name, large_run(minutes)) for name, minutes in METHODS_405B.items()]))


if __name__ == "__main__":
    main()
