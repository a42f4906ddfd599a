"""Mutated and hostile configurations: each is valid, or refused in one line; never a traceback, never silence.

    python tests/campaigns/configurations.py --count 3000 --seed 0

A case is a whole configuration with a few keys changed, a hostile document, a file with a few bytes changed, or a
hostile command line, given to `--validate`. Some that are valid are then run: what is valid ends well.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli
import tomli_w
from hostile import COMMANDS, DOCUMENTS, MAY_BE_VALID, MUST_BE_VALID, set_at, write
from server import Outcome, Server
from workbench import CONFIGURATIONS, Experiment, Tally, cases, main

SECONDS = 60.0
# What reads an endless file is stopped by this rather than by the machine's end.
MEMORY = 6 << 30
# One in so many valid configurations is run.
RUN_ONE_IN = 25
# Longer than this a run may take, as a valid configuration may ask for a lot: no failure, but no success either.
RUN_SECONDS = 60.0

NUMBERS: list[Any] = [0, 1, 2, 3, 7, 8, 16, 33, 64, 128, 1000, 2**31, 2**63 - 1, -1, -8, 0.5, 1.0, 1e-3, 6.5]
ODD_NUMBERS: list[Any] = [2**64, -(10**20), 1e308, float("inf"), float("-inf"), float("nan"), 1e-320, 10**30, 1e9]
WORDS: list[Any] = ["w4", "w2g64", "w4g128", "x8", "none", "auto", "cpu", "lqer-act", "gptq", "caldera", "adaptive"]
ODD_WORDS: list[Any] = [
    "", " ", "..", "/", "a/b", "\n", "a\nb", "\x7f", "é", "\u202e", "x" * 300, "y" * 5000, "%s", "{}", "$(id)", "-1",
    "nan", "--validate", "0:50%", ":", "\U0001f600",
]  # fmt: skip
SHAPES: list[Any] = [[], {}, [[]], [{}], {"kind": []}, {"kind": {}}, {"kind": ""}, [{"kind": {}}], [[[1]]], True, False]


def campaign(server: Server, folder: Path, count: int, seed: int, only: int | None = None) -> Tally:
    """`count` configurations."""
    tally = Tally()
    here = folder / "configurations"
    bases = _bases(folder / "inputs", here)
    for number, chance in cases(count, seed, only):
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
        # The hostile ones by name come first, each once; then chance has its way.
        hostile = [*DOCUMENTS.values(), *COMMANDS.values()]
        names = [*DOCUMENTS, *COMMANDS]
        if number < len(hostile):
            row, arguments = f"hostile: {names[number]}", hostile[number](chance.choice(bases), here)
        else:
            row, make = chance.choice(MUTATIONS)
            arguments = make(chance.choice(bases), here, chance)
        done = server.run("--validate", *arguments, timeout=SECONDS, memory=MEMORY)
        problem = objection(done)
        if problem is None and number < len(hostile):
            name = names[number]
            if done.status == 0 and name not in MUST_BE_VALID | MAY_BE_VALID:
                problem = "said to be valid"
            if done.status and name in MUST_BE_VALID:
                problem = f"refused: {done.last_line}"
        if problem is None and done.status == 0 and not row.startswith("hostile") and not chance.randrange(RUN_ONE_IN):
            ran = server.run(*arguments, timeout=RUN_SECONDS, memory=MEMORY)
            if ran.status is not None:
                problem = ran.objection(allowed=[0])
            row = f"run: {row}"
        outcome = "refused" if done.status else "valid"
        row = row.split(": ")[0] if row.startswith("hostile") else row
        if problem is None:
            tally.add(row, outcome)
        else:
            what = names[number] if number < len(hostile) else " ".join(arguments)[:300]
            tally.fail(row, number, f"{problem} [{what}]")
    return tally


def objection(done: Outcome) -> str | None:
    """What is wrong with an answer of `--validate`, which has nothing to say on stderr but its one line."""
    problem = done.objection(allowed=[0, 1, 2])
    if problem is None and done.status and len(done.stderr.rstrip("\n").splitlines()) != 1:
        problem = f"exit {done.status} with {len(done.stderr.splitlines())} lines on stderr: {done.last_line!r}"
    return problem


def _bases(inputs: Path, here: Path) -> list[dict[str, Any]]:
    """The configurations of the tiny experiment as one document each, with everything they extend in it."""
    bases = []
    for name in CONFIGURATIONS:
        values = tomli.loads((inputs / "tiny.toml").read_text(encoding="utf-8"))
        formats: dict[str, Any] = {}
        for parent in values.pop("extends"):
            formats |= tomli.loads(Path(parent).read_text(encoding="utf-8"))["formats"]
        values["formats"] = formats
        for override in Experiment(inputs, here / "out").arguments(name)[2:]:
            key, _, text = override.removeprefix("--").partition("=")
            set_at(values, key.split("."), _value(text))
        bases.append(values)
    return bases


def _value(text: str) -> Any:
    try:
        return tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return text


# Mutations: (configuration, folder, chance) -> command line


def _places(values: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    keys = list(values) if isinstance(values, dict) else range(len(values))
    found = []
    for key in keys:
        found.append((values, key))
        if isinstance(values[key], dict | list):
            found += _places(values[key])
    return found


def _anything(chance: random.Random) -> Any:
    return chance.choice(chance.choice([NUMBERS, ODD_NUMBERS, WORDS, ODD_WORDS, SHAPES]))


def _other_values(base: dict[str, Any], here: Path, chance: random.Random) -> list[str]:
    values = json.loads(json.dumps(base))
    for _ in range(chance.randint(1, 3)):
        container, key = chance.choice(_places(values))
        container[key] = _anything(chance)
    return write(values, here)


def _near_values(base: dict[str, Any], here: Path, chance: random.Random) -> list[str]:
    """Numbers for numbers and words for words: much of it is valid."""
    values = json.loads(json.dumps(base))
    for _ in range(chance.randint(1, 4)):
        container, key = chance.choice(_places(values))
        value = container[key]
        if isinstance(value, bool):
            container[key] = not value
        elif isinstance(value, int | float):
            container[key] = chance.choice(NUMBERS)
        elif isinstance(value, str):
            container[key] = chance.choice(WORDS)
    return write(values, here)


def _other_keys(base: dict[str, Any], here: Path, chance: random.Random) -> list[str]:
    values = json.loads(json.dumps(base))
    tables = [container for container, _ in _places(values) if isinstance(container, dict)]
    table = chance.choice(tables)
    what = chance.randrange(3)
    if what == 0:
        table[chance.choice([*WORDS, *ODD_WORDS])] = _anything(chance)
    elif what == 1 and table:
        del table[chance.choice(list(table))]
    elif table:
        key = chance.choice(list(table))
        letters = list(key)
        chance.shuffle(letters)
        table["".join(letters)] = table.pop(key)
    return write(values, here)


def _of_another(base: dict[str, Any], here: Path, chance: random.Random) -> list[str]:
    """A value from elsewhere in the document."""
    values = json.loads(json.dumps(base))
    (container, key), (other, place) = chance.choice(_places(values)), chance.choice(_places(values))
    container[key] = json.loads(json.dumps(other[place]))
    return write(values, here)


def _overrides(base: dict[str, Any], here: Path, chance: random.Random) -> list[str]:
    arguments = write(base, here)
    sections = ["model", "tag", "seed", "device", "dtype", "quantize.weight", "quantize.method", "quantize.rounding"]
    sections += ["quantize.transforms", "quantize.low_rank.rank", "calibration.seq_len", "calibration.max_memory"]
    sections += ["evaluation.perplexity.seq_len", "finetune.epochs", "output_dir", "quantize.skip", "x", "formats.w4"]
    for _ in range(chance.randint(1, 4)):
        value = _anything(chance)
        text = json.dumps(value) if chance.random() < 0.5 else str(value)
        key = chance.choice(sections)
        if chance.random() < 0.1:
            key = ".".join(chance.choice([*WORDS, *ODD_WORDS]) for _ in range(chance.randint(1, 5)))
        arguments.append(f"--{key}={text}".replace("\x00", ""))
    return arguments


def _broken_bytes(base: dict[str, Any], here: Path, chance: random.Random) -> list[str]:
    content = bytearray(tomli_w.dumps(base), "utf-8")
    for _ in range(chance.randint(1, 8)):
        place = chance.randrange(len(content))
        what = chance.randrange(4)
        if what == 0:
            content[place] = chance.randrange(256)
        elif what == 1:
            del content[place : place + chance.randint(1, 40)]
        elif what == 2:
            content[place:place] = bytes(content[place : place + chance.randint(1, 40)])
        else:
            content[place:place] = chance.choice(
                [b"[", b"]", b'"', b"'''", b"\x00", b"\xff", b"\r\n", b"=", b"{", b"."]
            )
    (here / "case.toml").write_bytes(content)
    return [str(here / "case.toml")]


Mutation = Callable[[dict[str, Any], Path, random.Random], list[str]]
MUTATIONS: list[tuple[str, Mutation]] = [
    ("other values", _other_values),
    ("near values", _near_values),
    ("other keys", _other_keys),
    ("values of another key", _of_another),
    ("overrides", _overrides),
    ("broken bytes", _broken_bytes),
]


if __name__ == "__main__":
    main(campaign, __doc__, count=3000)
