"""The model and the texts that every run of a call has, in a folder that later calls can use again."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from pipeline_benchmark.checkpoint import Shape, word_tokenizer, write_model, write_text

from lqer.config import read_config
from lqer.models.source import pick_device
from lqer.report.environment import device_name
from lqer.run.preflight import CheckedRun
from lqer.store.records import MANIFEST

TAG = "benchmark"


@dataclass(frozen=True)
class Setup:
    """windows: of the evaluation. overrides: settings that all runs have.

    given: a model that is there, whose texts the settings name; else one of `shape` is written, with texts.
    """

    folder: Path
    shape: Shape
    windows: int
    overrides: list[str]
    given: Path | None = None

    @property
    def model(self) -> Path:
        return self.given or self.folder / "model"

    def config(self, preset: str) -> Path:
        """The configuration of a preset's runs."""
        path = self.folder / f"{preset}.toml"
        perplexity: dict[str, Any] = {"max_windows": self.windows}
        experiment = {
            "extends": f"preset:{preset}",
            "model": str(self.model),
            "evaluation": {"baselines": ["original"], "perplexity": perplexity},
        }
        if self.given is None:
            perplexity["datasets"] = [str(self.folder / "evaluation.txt")]
            experiment["calibration"] = {"dataset": str(self.folder / "calibration.txt")}
        path.write_text(tomli_w.dumps(experiment))
        return path

    def output(self, preset: str, processes: int) -> Path:
        """The output_dir of what a gang of so many processes makes."""
        return self.folder / f"{preset}-{processes}"

    def write(self) -> None:
        """Write the model, and texts that are long enough for the windows of any preset, unless they are there."""
        if self.given is not None:
            return
        if not self.model.exists():
            write_model(self.model, self.shape, word_tokenizer(self.shape.vocabulary), pick_device("auto"))
        config = read_config(self.config("lqer-act"), TAG, self.overrides)
        assert config.evaluation.perplexity is not None, "the preset's, with a text of our own"
        lengths = {
            "calibration": config.calibration.num_samples * config.calibration.seq_len,
            "evaluation": self.windows * config.evaluation.perplexity.seq_len,
        }
        for seed, (part, tokens) in enumerate(lengths.items()):
            if not (self.folder / f"{part}.txt").exists():
                # Of a running text, the last ids of what is read may be dropped.
                write_text(self.folder / f"{part}.txt", self.shape.vocabulary, tokens + tokens // 10 + 100, seed)

    def describe(self) -> str:
        size = sum(file.stat().st_size for file in self.model.glob("*.safetensors"))
        blocks = f"{self.shape.blocks} blocks of {self.shape.hidden} x {self.shape.intermediate}"
        gpus = f"{torch.cuda.device_count()} x " if torch.cuda.is_available() else ""
        return (
            f"{gpus}{device_name(pick_device('auto'))}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; "
            f"{blocks if self.given is None else self.given.name}, {size / 1e9:.2f} GB"
        )


def perplexity_of(run: CheckedRun) -> float:
    """Of the quantized model, which the store has."""
    return run.experiment.perplexity["quantized"][0].result(run.store)["perplexity"]


def made_files(output: Path) -> dict[str, str]:
    """The hash of every file of every artifact but evaluations, from the manifests."""
    manifests = [path for kind in ("calibrate", "quantize") for path in output.glob(f"store/{kind}-*/{MANIFEST}")]
    return {
        f"{path.parent.name}/{name}": recorded_hash
        for path in manifests
        for name, recorded_hash in json.loads(path.read_text())["files"].items()
    }


def shown_equal(files: Mapping[str, str], alone: Mapping[str, str]) -> str:
    """How many files are those that one process made."""
    if not alone:
        return "not compared"
    equal = sum(files.get(name) == recorded_hash for name, recorded_hash in alone.items())
    return f"{equal} of {len(files.keys() | alone.keys())}"


def row(*cells: object) -> None:
    """Print a row of a Markdown table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def header(*cells: str) -> None:
    row(*cells)
    row(*["---"] * len(cells))
