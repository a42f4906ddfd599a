"""Damages a file of a store or of a checkpoint and looks whether anybody notices.

    python tests/campaigns/damage.py --count 700 --seed 0

A damaged artifact, finished or half-made, is refused by name or made again, and once it is removed, as the refusal
advises, the run ends as ever. A damaged copy of a checkpoint is refused by the name of the file. Nothing ends with
another number, and nothing with a traceback.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

from server import Server
from workbench import CONFIGURATIONS, Experiment, Tally, artifacts, cases, main, numbers, run_whole

LOGITS = Path(__file__).with_name("logits.py")
KINDS = ("bit", "cut", "removed", "extra", "empty", "folder", "braces", "no-manifest")
MANIFEST = "manifest.json"
# Refusals of artifacts that a case follows the advice of, one after the other.
MOST_REMOVALS = 3
FOLDER = re.compile(r"\S*/store/[a-z]+-[0-9a-f]{16}(\.partial)?")


def campaign(server: Server, folder: Path, count: int, seed: int, only: int | None = None) -> Tally:
    """`count` damaged files: of finished stores, of interrupted ones, and of copied checkpoints, in turns."""
    tally = Tally()
    whole: dict[str, Experiment] = {}
    logits: dict[str, str] = {}
    for number, chance in cases(count, seed, only):
        name = chance.choice([*CONFIGURATIONS])
        if name not in whole:
            whole[name] = Experiment(folder / "inputs", folder / "whole" / name)
            run_whole(server, whole[name], name)
            logits[name] = _logits(server, whole[name].output / name / "checkpoint")
        place = ("store", "interrupted", "checkpoint")[number % 3]
        if place == "checkpoint":
            row, problem = _damage_checkpoint(server, folder, whole[name], name, logits[name], chance)
        else:
            row, problem = _damage_store(server, folder, whole[name], name, place == "interrupted", chance)
        if problem is None:
            tally.add(f"{place} {row}", "right")
        else:
            tally.fail(f"{place} {row}", number, problem)
    return tally


def _logits(server: Server, checkpoint: Path) -> str:
    done = server.run(str(checkpoint), script=LOGITS)
    if done.status != 0:
        raise RuntimeError(f"{checkpoint} cannot be loaded: {done.stderr[-2000:]}")
    return done.stdout


def damage(path: Path, kind: str, chance: random.Random) -> Path:
    """Do something to a file. Returns the path of what was done to."""
    if kind == "bit":
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])
    elif kind == "removed":
        path.unlink()
    elif kind == "extra":
        path = path.with_name(f"more-{path.name}")
        path.write_bytes(b"{}")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "braces":
        path = path.with_name(MANIFEST) if path.with_name(MANIFEST).exists() else path
        path.write_text("{}", encoding="utf-8")
    else:
        path.with_name(MANIFEST).unlink(missing_ok=True)
        path = path.with_name(MANIFEST)
    return path


def _damage_store(
    server: Server, folder: Path, whole: Experiment, name: str, interrupted: bool, chance: random.Random
) -> tuple[str, str | None]:
    experiment = Experiment(folder / "inputs", folder / "damaged" / name)
    shutil.rmtree(experiment.output, ignore_errors=True)
    if interrupted:
        files: list[Path] = []
        at = chance.randint(20, 220)
        while not files:
            fault = {"events": "files", "root": str(experiment.output), "at": at}
            server.run(*experiment.arguments(name), fault=fault, hasty=True)
            found = sorted(experiment.store.glob("*.partial/[!.]*")) or sorted(experiment.store.glob("[!.]*/[!.]*"))
            # A library may be writing to a folder of its own.
            files = [path for path in found if path.is_file()]
            at = 20
    else:
        shutil.copytree(whole.output, experiment.output, symlinks=True)
        files = sorted(experiment.store.glob("[!.]*/*"))
    kind, victim = chance.choice(KINDS), chance.choice(files)
    damaged = damage(victim, kind, chance)
    told = f"{kind} {damaged.relative_to(experiment.store)}"
    done = server.run(*experiment.arguments(name))
    for _ in range(MOST_REMOVALS):
        if (objection := done.objection(allowed=[0, 2])) is not None:
            return kind, f"{objection}; {told}"
        if done.status == 0:
            break
        named = FOLDER.search(done.last_line)
        if named is None or not Path(named[0]).is_dir():
            return kind, f"the refusal names no artifact: {done.last_line}; {told}"
        shutil.rmtree(named[0])
        done = server.run(*experiment.arguments(name))
    if done.status != 0:
        return kind, f"still refused: {done.last_line}; {told}"
    if numbers(experiment.output / name) != numbers(whole.output / name):
        return kind, f"other numbers; {told}"
    checkpoint = (experiment.output / name / "checkpoint").resolve().name
    if artifacts(experiment.store)[checkpoint] != artifacts(whole.store)[checkpoint]:
        return kind, f"the run's checkpoint is a damaged one; {told}"
    return kind, None


def _damage_checkpoint(
    server: Server, folder: Path, whole: Experiment, name: str, logits: str, chance: random.Random
) -> tuple[str, str | None]:
    copied = folder / "copied"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(whole.output / name / "checkpoint", copied)
    kind, victim = chance.choice(KINDS), chance.choice(sorted(copied.iterdir()))
    recorded = json.loads((copied / MANIFEST).read_text(encoding="utf-8"))["files"]
    damaged = damage(victim, kind, chance)
    told = f"{kind} {damaged.name} of a checkpoint of {name}"
    done = server.run(str(copied), script=LOGITS)
    if (objection := done.objection(allowed=[0, 2])) is not None:
        return kind, f"{objection}; {told}"
    if done.status == 2:
        return kind, None if damaged.name in done.last_line else f"not by name: {done.last_line}; {told}"
    if done.stdout != logits:
        return kind, f"loaded, with other logits; {told}"
    # Of the manifest only the list of files matters.
    if damaged.name == MANIFEST and damaged.is_file():
        content = damaged.read_bytes().decode("utf-8", "replace")
        return kind, None if all(sha256 in content for sha256 in recorded.values()) else f"loaded; {told}"
    return kind, f"loaded as if nothing were; {told}"


if __name__ == "__main__":
    main(campaign, __doc__, count=700)
