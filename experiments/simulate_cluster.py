"""How long a sweep or a run would take on so many GPUs, by the schedule of [cluster] and assumed minutes of each job.

    python experiments/simulate_cluster.py

Nothing is measured: the order in which jobs start is that of lqer.jobs.graph.Schedule, which a cluster runs; how long
each takes is assumed, as the first tables say. Prints the tables of docs/cluster.md.
"""

from __future__ import annotations

import argparse
import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lqer.jobs.graph import Job, Schedule
from lqer.run import costs
from lqer.run.chunks import Chunk

# How many runs, and minutes of one checkpoint of a model of 7B parameters.
SCHEMES = {
    "lqer, qera": (160, costs.OTHERWISE),
    "gptq": (50, costs.MINUTES["gptq"]),
    "gptvq": (30, costs.MINUTES["vector"]),
    "caldera": (30, costs.MINUTES["caldera"]),
    "tesseraq": (30, costs.MINUTES["adaptive"]),
}
CALIBRATIONS, CALIBRATION = 2, costs.CALIBRATION
# Baselines without low-rank factors, which several runs share.
PLAIN, PLAIN_MINUTES = 12, costs.OTHERWISE
# All texts and tasks of one model.
EVALUATION = costs.EVALUATION

# The shape of Llama 405B: blocks, and minutes on one GPU with memory enough.
BLOCKS = 126
CALIBRATION_405B = 15.0
EVALUATION_405B = 9.0
# 812 GB of weights at 6 GB/s.
READING_405B = 812 / 6 / 60
# Of packed weights of 4 bits.
READING_PACKED_405B = READING_405B / 4
# out_features, in_features of a block's linears.
LINEARS_405B = {
    "q_proj": (16384, 16384), "k_proj": (1024, 16384), "v_proj": (1024, 16384), "o_proj": (16384, 16384),
    "gate_proj": (53248, 16384), "up_proj": (53248, 16384), "down_proj": (16384, 53248),
}  # fmt: skip
# As one of 7B parameters by the number of weights. What a linear that is a job of its own takes besides: its block and
# statistics at 6 GB/s, up to 6.4 and 14.6 GB.
CALDERA_405B = costs.MINUTES["caldera"] * BLOCKS * sum(map(math.prod, LINEARS_405B.values())) / costs.WEIGHTS
READING_A_BLOCK = (6.4 + 14.6) / 6 / 60
PARTS = 64
# The job whose statistics of a block let others start, and what it and all others come to.
CALIBRATE, END = "calibrate", "end"
GPUS, GPUS_405B = (1, 8, 64), (1, 8, 64, 512)


@dataclass(frozen=True)
class Outcome:
    """minutes: until the last job ends. busy: the part of all workers' time that is work."""

    minutes: float
    busy: float


def job(name: str, minutes: float, needs: Sequence[str] = (), blocks: Sequence[int] = ()) -> Job:
    """blocks: those whose statistics are enough for it to start; without any, it needs all of CALIBRATE."""
    enough = {CALIBRATE: tuple(map(str, blocks))} if blocks else {}
    return Job(name, (), tuple(needs), lambda store: None, 60 * minutes, enough=enough)


def simulate(jobs: Sequence[Job], workers: int, knows_lengths: bool = True) -> Outcome:
    """Hand out jobs as a cluster does. knows_lengths: else they start in the order given.

    CALIBRATE gathers the statistics of a block in as long as those of any other.
    """
    length = {one.name: one.seconds / 60 for one in jobs}
    schedule = Schedule(jobs if knows_lengths else [replace(one, seconds=0.0) for one in jobs])
    blocks = sorted({int(block) for one in jobs for block in one.enough.get(CALIBRATE, ())})
    # When something comes: the statistics of a block, or the end of a job.
    coming: list[tuple[float, str, str]] = []
    now, busy = 0.0, 0
    while not schedule.is_over:
        for name in schedule.ready()[: workers - busy]:
            schedule.start(name)
            busy += 1
            heapq.heappush(coming, (now + length[name], name, END))
            for block in blocks if name == CALIBRATE else ():
                heapq.heappush(coming, (now + length[name] * (block + 1) / len(blocks), name, str(block)))
        now, name, what = heapq.heappop(coming)
        if what == END:
            busy -= 1
            schedule.finish(name)
        else:
            schedule.see(name, [what])
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


def by_blocks() -> list[Job]:
    """The jobs of a checkpoint of 405B parameters in parts of its blocks."""
    parts = [Chunk(part + 1, PARTS).blocks(BLOCKS) for part in range(PARTS)]
    of_block = CALDERA_405B / BLOCKS + READING_A_BLOCK
    return [job(f"part {part}", of_block * len(blocks), [CALIBRATE], blocks) for part, blocks in enumerate(parts)]


def by_linears() -> list[Job]:
    """The same by its linears, each of which reads the block and its statistics."""
    of_weight = CALDERA_405B / BLOCKS / sum(map(math.prod, LINEARS_405B.values()))
    return [
        job(f"{block} {name}", of_weight * math.prod(shape) + READING_A_BLOCK, [CALIBRATE], [block])
        for block in range(BLOCKS)
        for name, shape in LINEARS_405B.items()
    ]


def large_run(parts: Sequence[Job], waits: bool = False) -> list[Job]:
    """One run of 405B parameters, evaluated block by block beside the original.

    waits: whether parts start when all statistics are there.
    """
    parts = [replace(part, enough={}) for part in parts] if waits else parts
    return [
        job(CALIBRATE, max(CALIBRATION_405B, READING_405B)),
        *parts,
        job("evaluate quantized", EVALUATION_405B + READING_PACKED_405B, [one.name for one in parts]),
        job("evaluate original", EVALUATION_405B + READING_405B),
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def shown(minutes: float) -> str:
    return f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.0f} min"


def simulated(name: str, jobs: Sequence[Job], gpus: Sequence[int], knows_lengths: bool = True) -> list[str]:
    """A row: hours, and how much of them is work, for each number of GPUs."""
    found = [simulate(jobs, count, knows_lengths) for count in gpus]
    return [name, *(f"{shown(one.minutes)}, {one.busy:.0%} busy" for one in found)]


def counted(gpus: Sequence[int]) -> list[str]:
    return [f"{count} GPU{'s' if count > 1 else ''}" for count in gpus]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    assumed = [[kind, str(runs), f"{minutes:g}"] for kind, (runs, minutes) in SCHEMES.items()]
    assumed += [["calibration", str(CALIBRATIONS), f"{CALIBRATION:g}"], ["baseline", str(PLAIN), f"{PLAIN_MINUTES:g}"]]
    assumed += [["evaluation of a model", str(300 + PLAIN + 1), f"{EVALUATION:g}"]]
    print(table(["7B parameters", "jobs", "assumed minutes on one H200"], assumed))
    rows = [
        simulated("nothing in common, in order", atlas(shared=False), GPUS, knows_lengths=False),
        simulated("one graph, in the order written", atlas(shared=True), GPUS, knows_lengths=False),
        simulated("one graph, longest first", atlas(shared=True), GPUS),
    ]
    print(table(["300 runs", *counted(GPUS)], rows))
    assumed = [["calibration", f"{CALIBRATION_405B:g}"]]
    assumed += [["caldera", f"{CALDERA_405B:.0f}"], ["reading a block and its statistics", f"{READING_A_BLOCK:.2f}"]]
    assumed += [["evaluation of a model, and reading it", f"{EVALUATION_405B:g} + {READING_405B:.1f}"]]
    print(table(["405B parameters", "assumed minutes on one GPU with memory enough"], assumed))
    ways = {f"{BLOCKS} blocks in {PARTS} parts": by_blocks(), f"{BLOCKS * len(LINEARS_405B)} linears": by_linears()}
    rows = [
        simulated(f"caldera, {name}{after}", large_run(parts, waits), GPUS_405B)
        for name, parts in ways.items()
        for after, waits in ((", after all statistics", True), ("", False))
    ]
    print(table(["one run", *counted(GPUS_405B)], rows))


if __name__ == "__main__":
    main()
