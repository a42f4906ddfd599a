"""Every causal architecture of the installed transformers, tiny and random: walked exactly, or refused at once.

    python tests/campaigns/architectures.py --seed 0 [--count 20]

Walked exactly: a run ends, and the perplexities of evaluating block by block are those of the whole model. Refused at
once: exit status 2 and one line, by `--validate` and by the run, before anything is in the store. That holds for
low-rank reconstruction and for the transforms and roundings that work on whole blocks.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

from server import Server
from tiny import CANNOT_BE_BUILT, causal_kinds
from workbench import Experiment, Tally, main, write_config

TINY = Path(__file__).with_name("tiny.py")
# Evaluated whole and block by block; the others have to end.
RECONSTRUCTION = "lqer"
BLOCK_PARTS = ("tesseraq", "omniquant")
TOLERANCE = 1e-6


def campaign(
    server: Server, folder: Path, count: int, seed: int, only: int | None = None, kinds: list[str] | None = None
) -> Tally:
    """`count` architectures, or all of them, in an order that depends on the seed."""
    tally = Tally()
    kinds = kinds or random.Random(seed).sample(causal_kinds(), len(causal_kinds()))
    for number, kind in enumerate(kinds):
        if number >= count or (only is not None and number != only):
            continue
        inputs = folder / "architectures"
        shutil.rmtree(inputs, ignore_errors=True)
        inputs.mkdir()
        built = server.run(kind, str(inputs / "model"), script=TINY)
        if built.status == CANNOT_BE_BUILT:
            tally.add("causal", "cannot be built small")
            continue
        for source in ("calibration.txt", "evaluation.txt"):
            shutil.copy(folder / "inputs" / source, inputs / source)
        write_config(inputs, inputs / "model")
        outcome, problem = _try(server, inputs)
        if problem is None:
            tally.add("causal", outcome)
        else:
            tally.fail("causal", number, f"{kind}: {problem}")
    return tally


def _try(server: Server, inputs: Path) -> tuple[str, str | None]:
    found: dict[str, list[dict[str, float]]] = {}
    for name in (RECONSTRUCTION, *BLOCK_PARTS):
        for way in ("whole", "blockwise") if name == RECONSTRUCTION else ("whole",):
            experiment = Experiment(inputs, inputs / f"{name}-{way}")
            overrides = [f"--evaluation.blockwise={json.dumps(way == 'blockwise')}"]
            if name == RECONSTRUCTION:
                overrides.append("--quantize.attention=none")
            arguments = experiment.arguments(name, *overrides)
            validated = server.run("--validate", *arguments)
            done = server.run(*arguments)
            for outcome in (validated, done):
                if (objection := outcome.objection(allowed=[0, 2])) is not None:
                    return "", f"{name} {way}: {objection}"
            if validated.status != done.status:
                return "", f"{name} {way}: --validate ends with {validated.status}, the run says {done.last_line}"
            if done.status == 2 and [*experiment.store.glob("[!.]*")]:
                return "", f"{name} {way}: refused after work: {done.last_line}"
            if done.status == 0:
                results = json.loads((experiment.output / name / "results.json").read_text(encoding="utf-8"))
                found.setdefault(name, []).append(results["perplexity"][0])
    if RECONSTRUCTION not in found:
        return "refused", None
    rows = found[RECONSTRUCTION]
    for kind in ("original", "quantized"):
        values = [row[kind] for row in rows]
        if len(values) == 2 and not math.isclose(*values, rel_tol=TOLERANCE):
            return "", f"{kind} evaluated whole {values[0]}, block by block {values[1]}"
    return ("walked" if len(rows) == 2 else "walked, not block by block"), None


if __name__ == "__main__":
    main(campaign, __doc__, count=10**9)
