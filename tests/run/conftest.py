"""A tiny random model, its tokenizer and two texts on disk: a whole experiment that runs in seconds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from clusters import two_cpus
from helpers import byte_tokenizer, tiny_llama

from lqer.config import read_config
from lqer.report import figures, layer_figures
from lqer.results import Results
from lqer.run import pipeline

ROOT = Path(__file__).parents[2]


def save_tiny_llama(folder: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "max_position_embeddings": 128}
    model = tiny_llama(**sizes, initializer_range=0.02, bos_token_id=0, eos_token_id=0)
    model.to(torch.bfloat16).save_pretrained(folder)


@dataclass(frozen=True)
class Experiment:
    """A folder with a model, two texts and a config that uses them."""

    folder: Path
    config: Path

    @property
    def output(self) -> Path:
        return self.folder / "checkpoints"

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(ROOT / "experiments/pipeline.py"), str(self.config), *arguments]

    def stages(self) -> list[str]:
        """The stages of the artifacts in the store, one name for each artifact."""
        return sorted(path.name.split("-")[0] for path in (self.output / "store").glob("[!.]*"))

    def task(self) -> tuple[Path, list[str]]:
        """Write the rows of a task. Returns their folder, and the overrides that ask for it."""
        folder = self.folder / "tasks" / "arc_easy"
        folder.mkdir(parents=True)
        choices = {"text": ["red", "blue", "green"], "label": ["A", "B", "C"]}
        rows = [{"question": f"Colour {i}?", "choices": choices, "answerKey": "ABC"[i % 3]} for i in range(9)]
        (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder, [
            "--evaluation.downstream.tasks=['arc_easy_local']",
            f"--evaluation.downstream.include_path={ROOT / 'experiments/tasks'}",
            f"--evaluation.downstream.data_dir={folder.parent}",
        ]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    save_tiny_llama(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_experiment(tmp_path: Path, tiny_model: Path) -> Experiment:
    text = "\n".join(topics[name] for name in sorted(topics))
    (tmp_path / "calibration.txt").write_text(text[:20_000])
    (tmp_path / "evaluation.txt").write_text(text[20_000:26_000])
    config = tmp_path / "tiny.toml"
    config.write_text(f"""
extends = "{ROOT / "configs/formats/mxint.toml"}"
model = "{tiny_model}"
output_dir = "{tmp_path / "checkpoints"}"
device = "cpu"

[calibration]
dataset = "{tmp_path / "calibration.txt"}"
num_samples = 8
seq_len = 64
batch_size = 2
error_tokens = 64

[quantize]
weight = "w4"
activation = "x8"
attention = "x8"
low_rank = {{ rank = 8, format = "x8" }}

[evaluation]
baselines = ["original", "rtn"]

[evaluation.perplexity]
datasets = ["{tmp_path / "evaluation.txt"}"]
seq_len = 64
batch_size = 4
""")
    return Experiment(tmp_path, config)


@pytest.fixture
def experiment(tmp_path: Path, tiny_model: Path) -> Experiment:
    return write_experiment(tmp_path, tiny_model)


@pytest.fixture
def run(experiment: Experiment) -> Callable[..., Results]:
    def run_with(*overrides: str, tag: str | None = None) -> Results:
        return pipeline.run(read_config(experiment.config, tag, overrides))

    return run_with


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Experiment:
    """An experiment of the same content in a folder of its own, shared by the tests of a module."""
    return write_experiment(tmp_path_factory.mktemp("undisturbed"), tiny_model)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two CPUs, started once for a module: connecting to one takes a fraction of starting it."""
    with two_cpus() as found:
        yield found


@pytest.fixture(autouse=True)
def without_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a tiny run's time: only tests marked `figures` see it done."""
    if "figures" not in request.keywords:
        for module in (figures, layer_figures):
            for name in [name for name in vars(module) if name.startswith("save_")]:
                monkeypatch.setattr(module, name, lambda *arguments: None)
