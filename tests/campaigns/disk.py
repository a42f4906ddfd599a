"""Has the disk refuse the n-th write of a run, as a full, broken or read-only one does, then gives it back.

    python tests/campaigns/disk.py --count 200 --seed 0

While the fault lasts the run ends with exit status 1 and one line; the rerun ends with the bytes of a run that met no
fault. Needs a C compiler, for the fault lies below Python: tensors are written by native code.
"""

from __future__ import annotations

import errno
import shutil
import sys
from pathlib import Path

from server import Server
from workbench import CONFIGURATIONS, Experiment, Tally, cases, difference, main, run_whole

NAMES = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES")


def campaign(server: Server, folder: Path, count: int, seed: int, only: int | None = None) -> Tally:
    """`count` writes that fail, over all configurations."""
    tally = Tally()
    if not server.has_library:
        print("skipped: no C compiler", file=sys.stderr)
        return tally
    whole: dict[str, Experiment] = {}
    totals: dict[str, int] = {}
    for number, chance in cases(count, seed, only):
        name = [*CONFIGURATIONS][number % len(CONFIGURATIONS)]
        if name not in whole:
            whole[name] = Experiment(folder / "inputs", folder / "whole" / name)
            counting = {"events": "writes", "root": str(whole[name].output)}
            totals[name] = run_whole(server, whole[name], name, fault=counting, hasty=True).events
        experiment = Experiment(folder / "inputs", folder / "refused" / name)
        shutil.rmtree(experiment.output, ignore_errors=True)
        code = chance.choice(NAMES)
        fault = {
            "events": "writes", "root": str(experiment.output), "at": chance.randint(1, totals[name]),
            "errno": getattr(errno, code), "lasting": int(chance.random() < 0.7),
        }  # fmt: skip
        refused = server.run(*experiment.arguments(name), fault=fault, hasty=True)
        # A write that fails once may be made good, as a lock file's is; then there is nothing to say.
        problems = [refused.objection(allowed=[1] if fault["lasting"] else [0, 1])]
        if problems == [None] and refused.status == 1 and str(experiment.output) not in refused.last_line:
            problems = [f"a line without the path: {refused.last_line}"]
        again = server.run(*experiment.arguments(name), hasty=True)
        problems.append(again.objection(allowed=[0]) or difference(experiment, whole[name], name))
        if found := [problem for problem in problems if problem is not None]:
            lasting = " for good" if fault["lasting"] else ""
            at = f"{code}{lasting} at {fault['at']}, {refused.where}"
            tally.fail(name, number, f"{'; then '.join(found)}; {at}")
        else:
            tally.add(name, code)
    return tally


if __name__ == "__main__":
    main(campaign, __doc__, count=200)
