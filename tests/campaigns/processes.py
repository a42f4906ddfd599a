"""Eight processes at once on one store, round after round: with one tag and with several, alike and different.

    python tests/campaigns/processes.py --count 20 --seed 0

A round begins with an empty store. Every process ends its run, or is told in one line that its tag is taken; each tag's
folder holds one experiment's configuration, with that experiment's own numbers.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import tomli
from server import Server
from workbench import CONFIGURATIONS, Experiment, Tally, cases, main, numbers, run_whole

PROCESSES = 8
MODES = ("one tag", "several tags", "one tag, two experiments", "chunks")
SHARES = 4


def campaign(server: Server, folder: Path, count: int, seed: int, only: int | None = None) -> Tally:
    """`count` rounds of eight processes."""
    tally = Tally()
    whole: dict[str, Experiment] = {}
    for number, chance in cases(count, seed, only):
        mode = MODES[number % len(MODES)]
        names = chance.sample([*CONFIGURATIONS], 2 if mode in ("several tags", "one tag, two experiments") else 1)
        if mode == "chunks":
            names = ["lqer"]
        experiment = Experiment(folder / "inputs", folder / "shared")
        shutil.rmtree(experiment.output, ignore_errors=True)
        for name in names:
            if name not in whole:
                whole[name] = Experiment(folder / "inputs", folder / "whole" / name)
                run_whole(server, whole[name], name)
        commands, ran = [], {}
        for process in range(PROCESSES):
            name = names[process % len(names)]
            tag = {"several tags": f"tag-{process}"}.get(mode, "tag")
            share = ["--chunk", f"{process % SHARES + 1}/{SHARES}"] if mode == "chunks" else []
            config, _, *overrides = experiment.arguments(name)
            commands.append([*share, config, tag, *overrides])
            ran[tag] = names if mode == "one tag, two experiments" else [name]
        problem = _round(server, experiment, commands, ran, whole)
        if problem is None:
            tally.add(mode, "right")
        else:
            tally.fail(mode, number, f"{problem} ({', '.join(names)})")
    return tally


def _round(
    server: Server,
    experiment: Experiment,
    commands: list[list[str]],
    ran: dict[str, list[str]],
    whole: dict[str, Experiment],
) -> str | None:
    done = server.run_together(commands)
    for outcome in done:
        if (objection := outcome.objection(allowed=[0, 2])) is not None:
            return objection
        if outcome.status == 2 and str(experiment.output) not in outcome.last_line:
            return f"refused without its folder's name: {outcome.last_line}"
    if all(outcome.status for outcome in done):
        return "nobody was let through"
    for tag, names in ran.items():
        run = experiment.output / tag
        config = tomli.loads((run / "config.toml").read_text(encoding="utf-8"))
        found = [name for name in names if numbers(run) == numbers(whole[name].output / name)]
        if not found:
            return f"{tag} holds the numbers of no experiment"
        expected = tomli.loads((whole[found[0]].output / found[0] / "config.toml").read_text(encoding="utf-8"))
        if config["quantize"] != expected["quantize"]:
            return f"{tag} holds the configuration of one experiment and the numbers of another"
    return None


if __name__ == "__main__":
    main(campaign, __doc__, count=20)
