"""Kills runs at every kind of moment, reruns them until they are done, and holds what is left against a whole run.

    python tests/campaigns/kills.py --count 1000 --seed 0

A case is a series of kills of one experiment: at the n-th change of the file system, at the n-th function call of the
package, or in the middle of the n-th write of the C library, each followed by the same command. Series end when a run
comes to its end. `--count` is the number of kills.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server import ROOT, Outcome, Server
from workbench import CONFIGURATIONS, Experiment, Tally, cases, difference, main, run_whole

# Kills of one series, after which the run is left alone; some come while the one before is being made good.
MOST_KILLS = 6
STAGE = re.compile(r"/store/\.?([a-z]+)-[0-9a-f]{16}")


def campaign(server: Server, folder: Path, count: int, seed: int, only: int | None = None) -> Tally:
    """`count` kills spread over all configurations."""
    tally = Tally()
    whole: dict[str, Experiment] = {}
    totals: dict[tuple[str, str], int] = {}
    kills = 0
    for number, chance in cases(10**9, seed, only):
        if kills >= count:
            break
        name = [*CONFIGURATIONS][number % len(CONFIGURATIONS)]
        kinds = ["files", "calls", *(["writes"] if server.has_library else [])]
        # Every configuration meets every kind, whatever their numbers have in common.
        kind = kinds[(number + number // len(CONFIGURATIONS)) % len(kinds)]
        if (name, kind) not in totals:
            counted = Experiment(folder / "inputs", folder / ("counted" if name in whole else "whole") / name)
            done = run_whole(server, counted, name, fault=_fault(counted, kind, None), hasty=True)
            whole.setdefault(name, counted)
            totals[name, kind] = done.events
        experiment = Experiment(folder / "inputs", folder / "killed" / name)
        shutil.rmtree(experiment.output, ignore_errors=True)
        most = chance.randint(1, min(MOST_KILLS, count - kills))
        stages, last = _series(server, experiment, name, kind, totals[name, kind], most, chance)
        kills += len(stages)
        problem = last.objection(allowed=[0]) or difference(experiment, whole[name], name)
        for stage in stages[: -1 if problem else None]:
            tally.add(name, stage)
        if problem is not None:
            tally.fail(name, number, f"{problem}; killed {', then '.join(stages)} ({kind})")
    return tally


def _series(
    server: Server, experiment: Experiment, name: str, kind: str, total: int, most: int, chance: random.Random
) -> tuple[list[str], Outcome]:
    """Kill and rerun. Returns the stage of every kill, and how the last run, which nobody killed, ended."""
    stages: list[str] = []
    while len(stages) < most:
        # Half of the kills early in what is left, where a rerun makes good what the last kill left behind.
        at = chance.randint(1, total if chance.random() < 0.5 or not stages else max(total // 10, 1))
        done = server.run(*experiment.arguments(name), fault=_fault(experiment, kind, at), hasty=True)
        if not done.was_killed:
            return stages or ["never"], done
        stages.append(_stage(kind, done.where, experiment))
    return stages, server.run(*experiment.arguments(name), hasty=True)


def _fault(experiment: Experiment, kind: str, at: int | None) -> Mapping[str, Any]:
    fault: dict[str, Any] = {"events": kind, "root": str(experiment.output), "package": f"{ROOT}/lqer/"}
    return fault if at is None else fault | {"at": at}


def _stage(kind: str, where: str, experiment: Experiment) -> str:
    """The stage of a kill: that of the file it was about, or of the newest artifact there is."""
    found = STAGE.search(where)
    if found is not None:
        return found[1]
    if kind == "files":
        return "report"
    partial = [*experiment.store.glob("*.partial")]
    found = STAGE.search(str(partial[0])) if partial else None
    return found[1] if found else "between"


if __name__ == "__main__":
    main(campaign, __doc__, count=1000)
