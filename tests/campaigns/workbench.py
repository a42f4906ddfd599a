"""What all campaigns share: a tiny experiment on disk, configurations that reach every stage, stores held against
each other, and the table of counts that a campaign ends with.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from faults import compile_library
from server import ROOT, Outcome, Server
from tiny import build

ADAPTIVE = '--quantize.rounding={ kind = "adaptive", soft_fractions = [0.5, 0.2], steps = 3, batch_size = 2 }'
FINETUNE = {"columns": "4", "num_samples": "4", "validation_samples": "2", "seq_len": "32", "epochs": "3"}
# Overrides of the tiny experiment's configuration; between them they reach every stage, in both orders of blocks.
CONFIGURATIONS: dict[str, list[str]] = {
    "lqer": [
        "--quantize.method=lqer-act", '--quantize.low_rank={ rank = 8, format = "x8" }', "--quantize.attention=x8",
    ],
    "rank-budget": ["--quantize.method=qera-exact", "--quantize.low_rank.budget_bits=6.5"],
    "gptq": ["--quantize.method=gptq", "--quantize.weight=w4g128"],
    "quarot": ["--quantize.method=gptq", '--quantize.transforms=["quarot"]', "--quantize.weight=w4channel"],
    "tesseraq": [
        "--quantize.method=lqer-act", "--quantize.low_rank.rank=4", "--quantize.weight=w2g64",
        '--quantize.transforms=["awq", "clip"]', ADAPTIVE,
    ],
    "omniquant": [
        "--quantize.method=none", "--quantize.weight=w2g64", '--quantize.transforms=[{ kind = "lwc", epochs = 3 }]',
    ],
    "finetune": [
        "--quantize.method=qera-approx", "--quantize.low_rank.rank=8", '--quantize.transforms=["hadamard"]',
        '--finetune.parts=["rht_signs", "low_rank"]', "--finetune.dataset={calibration}",
        *(f"--finetune.{key}={value}" for key, value in FINETUNE.items()),
    ],
    "blockwise": [
        "--quantize.method=lqer-svd", "--quantize.low_rank.rank=4", "--evaluation.blockwise=true",
        "--calibration.max_memory=1",
    ],
    # best-3 on experts: trellis codes of several widths, one linear after the other.
    "mixture": [
        "--model={mixture}", "--quantize.method=none", '--quantize.transforms=["hadamard"]',
        "--quantize.weight=trellis3", "--quantize.rounding=ldlq", "--quantize.order=sequential",
        '--quantize.widths=["trellis2", "trellis3", "trellis4"]', "--quantize.budget_bits=3.6",
    ],
}  # fmt: skip
# Of results.json: what another run of the same experiment must find again.
NUMBERS = ("bits", "baseline", "perplexity", "calibration", "layers", "finetune", "allocation", "experts")


@dataclass(frozen=True)
class Experiment:
    """A configuration on disk, its inputs shared, its outputs in a folder of its own."""

    inputs: Path
    output: Path

    @property
    def config(self) -> Path:
        return self.inputs / "tiny.toml"

    @property
    def store(self) -> Path:
        return self.output / "store"

    def arguments(self, name: str | None = None, *overrides: str) -> list[str]:
        """The command line of one of CONFIGURATIONS, or of the plain configuration."""
        chosen = [*CONFIGURATIONS.get(name or "", []), *overrides]
        for key, path in {"{calibration}": "calibration.txt", "{mixture}": "mixture"}.items():
            chosen = [text.replace(key, str(self.inputs / path)) for text in chosen]
        return [str(self.config), name or "plain", f"--output_dir={self.output}", *chosen]


def write_inputs(folder: Path, kind: str = "llama", windows: int = 4) -> Path:
    """A folder with a tiny model, a mixture of experts, two texts and a configuration that uses model and texts."""
    folder.mkdir(parents=True, exist_ok=True)
    build(folder / "model", kind, num_hidden_layers=2)
    build(folder / "mixture", "qwen3_moe", num_hidden_layers=2)
    write_texts(folder)
    write_config(folder, folder / "model", windows)
    return folder


def write_texts(folder: Path) -> None:
    text = "\n".join(topics[name] for name in sorted(topics))
    (folder / "calibration.txt").write_text(text[:8_000], encoding="utf-8")
    (folder / "evaluation.txt").write_text(text[20_000:22_000], encoding="utf-8")


def write_config(folder: Path, model: Path, windows: int = 4) -> None:
    names = ("mxint", "int", "codebook", "e8p", "trellis")
    formats = ", ".join(f'"{ROOT}/configs/formats/{name}.toml"' for name in names)
    (folder / "tiny.toml").write_text(
        f"""
extends = [{formats}]
model = "{model}"
output_dir = "{folder / "checkpoints"}"
device = "cpu"

[calibration]
dataset = "{folder / "calibration.txt"}"
num_samples = {windows}
seq_len = 32
error_tokens = 32

[quantize]
weight = "w4"

[evaluation.perplexity]
datasets = ["{folder / "evaluation.txt"}"]
seq_len = 32
batch_size = 4
max_windows = 8
""",
        encoding="utf-8",
    )


def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "not a file"


def artifacts(store: Path) -> dict[str, dict[str, str]]:
    """The sha256 of every file of every finished artifact, as it is on disk now; names that start with a dot aside."""
    found = {}
    for manifest in sorted(store.glob("[!.]*/manifest.json")):
        files = sorted(path for path in manifest.parent.iterdir() if path.name != "manifest.json")
        found[manifest.parent.name] = {path.name: _content(path) for path in files}
    return found


def numbers(run: Path) -> dict[str, Any]:
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    return {key: results.get(key) for key in NUMBERS}


def difference(experiment: Experiment, whole: Experiment, name: str) -> str | None:
    """How what a run left differs from what an undisturbed one did; None where it does not."""
    found, expected = artifacts(experiment.store), artifacts(whole.store)
    for artifact in sorted({*found, *expected}):
        if artifact not in expected:
            return f"{artifact} was made, which the undisturbed run has not"
        if artifact not in found:
            return f"{artifact} is missing"
        wrong = [file for file in {*found[artifact], *expected[artifact]}
                 if found[artifact].get(file) != expected[artifact].get(file)]  # fmt: skip
        if wrong:
            return f"{artifact}/{sorted(wrong)[0]} has other bytes"
    if leftovers := sorted(path.name for path in experiment.store.glob("*.partial")):
        return f"{leftovers[0]} is left over"
    if numbers(experiment.output / name) != numbers(whole.output / name):
        return "results.json holds other numbers"
    return None


@dataclass
class Tally:
    """Counts by row and outcome, and every failure with what repeats it."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, row: str, outcome: str) -> None:
        self.counts[row, outcome] += 1

    def fail(self, row: str, case: int | str, what: str) -> None:
        self.add(row, "FAILED")
        self.failures.append(f"{row}, --case {case}: {what}")
        # At once: a long campaign may be stopped before its table.
        print(self.failures[-1], file=sys.stderr, flush=True)

    def table(self) -> str:
        columns = sorted({outcome for _, outcome in self.counts})
        rows = [["", *columns]]
        for row in sorted({row for row, _ in self.counts}):
            rows.append([row, *(str(self.counts[row, column]) for column in columns)])
        rows.append(["all", *(str(sum(n for (_, found), n in self.counts.items() if found == c)) for c in columns)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


Campaign = Callable[[Server, Path, int, int, "int | None"], Tally]


def cases(count: int, seed: int, only: int | None) -> Iterator[tuple[int, random.Random]]:
    """Each case's number and its own source of chance, which depends on the seed and the number alone."""
    for number in range(count) if only is None else [only]:
        yield number, random.Random(f"{seed}:{number}")


@contextlib.contextmanager
def warm_server(folder: Path, with_library: bool = False) -> Iterator[Server]:
    """A server that has read the tiny experiment's configuration once; its inputs are in `folder`/inputs."""
    inputs = write_inputs(folder / "inputs")
    library = compile_library(folder) if with_library else None
    with Server([str(inputs / "tiny.toml")], library) as server:
        yield server


def main(campaign: Campaign, description: str | None, count: int) -> None:
    """The command line of a campaign script: prints its table, its failures, and exits with 1 if there are any."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only the case of this number, to repeat a failure")
    parser.add_argument("--keep", type=Path, help="a folder for the files, which is not removed")
    given = parser.parse_args()
    folder = given.keep or Path(tempfile.mkdtemp(prefix="campaign-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with warm_server(folder, with_library=True) as server:
            tally = campaign(server, folder, given.count, given.seed, given.case)
    finally:
        if given.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(tally.table())
    for failure in tally.failures:
        print(f"--seed {given.seed}, {failure}")
    sys.exit(1 if tally.failures else 0)


def run_whole(server: Server, experiment: Experiment, name: str, **options: Any) -> Outcome:
    """An undisturbed run, which must succeed."""
    shutil.rmtree(experiment.output, ignore_errors=True)
    done = server.run(*experiment.arguments(name), **options)
    if done.status != 0:
        raise RuntimeError(f"the undisturbed run of {name} ends with {done.status}: {done.stderr[-2000:]}")
    return done
