"""Golden runs: one tiny experiment per stage and order of blocks, down to the name and bytes of every artifact.

A change of structure must leave them as they are. After a change of the numbers that is meant, record them anew:

    python -m pytest tests/golden --record-golden

Floating-point sums differ in the last bit between processors, so bytes are compared where torch and the processor's
instruction set are those of the recording; the perplexities are compared everywhere.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_model import save_integer_llama
from helpers import byte_tokenizer

from lqer.config import read_config
from lqer.run.pipeline import run

RECORDED = Path(__file__).with_name("golden.json")
CONFIGS = Path(__file__).parents[2] / "configs"
RELATIVE_TOLERANCE = 2e-3

LQER = ["--quantize.method=lqer-act", '--quantize.low_rank={ rank = 8, format = "x8" }', "--quantize.attention=x8"]
ADAPTIVE = '--quantize.rounding={ kind = "adaptive", soft_fractions = [0.5, 0.2], steps = 3, batch_size = 2 }'
FINETUNE = {
    "parts": '["rht_signs", "low_rank"]', "columns": 4, "num_samples": 4, "validation_samples": 2, "seq_len": 32,
    "epochs": 2, "dataset": "{calibration}",
}  # fmt: skip
RUNS: dict[str, list[str]] = {
    "lqer": [*LQER, '--evaluation.baselines=["original", "rtn"]'],
    "rank-budget": [
        "--quantize.method=qera-exact", '--quantize.low_rank={ rank = 0, budget_bits = 6.5, format = "x8" }',
    ],
    "gptq": ["--quantize.method=gptq", "--quantize.weight=w4g128"],
    "gptvq": ["--quantize.method=gptvq", "--quantize.weight=vq2-2d-2048"],
    "caldera": [
        "--quantize.method=caldera", '--quantize.transforms=["hadamard"]', "--quantize.weight=e8p2",
        "--quantize.rounding=ldlq", '--quantize.low_rank={ rank = 4, format = "f8p4", axis = "outer" }',
    ],
    "quarot": ["--quantize.method=gptq", '--quantize.transforms=["quarot"]', "--quantize.weight=w4channel"],
    "tesseraq": [
        "--quantize.method=lqer-act", "--quantize.low_rank.rank=4", "--quantize.weight=w2g64",
        '--quantize.transforms=["awq", "clip"]', ADAPTIVE,
    ],
    "omniquant": [
        "--quantize.method=none", "--quantize.weight=w2g64", '--quantize.transforms=[{ kind = "lwc", epochs = 2 }]',
    ],
    "finetune": [
        "--quantize.method=caldera", '--quantize.transforms=["hadamard"]', "--quantize.weight=e8p2",
        "--quantize.rounding=ldlq", "--quantize.low_rank.rank=8",
        *(f"--finetune.{key}={value}" for key, value in FINETUNE.items()),
    ],
    "blockwise": [*LQER, "--evaluation.blockwise=true"],
}  # fmt: skip


def arithmetic() -> dict[str, str]:
    """What the last bit of a sum depends on."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__.split("+")[0], "machine": platform.machine(), "instructions": capability}


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def invented_text(words: int, seed: int) -> str:
    """Sentences of common words: the same on every machine and under every version of Python."""
    vocabulary = [
        "the",
        "a",
        "of",
        "in",
        "to",
        "and",
        "it",
        "was",
        "is",
        "that",
        "one",
        "two",
        "old",
        "new",
        "house",
        "river",
        "stone",
        "walked",
        "saw",
        "gave",
        "took",
    ]
    choices = torch.randint(len(vocabulary), (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(vocabulary[choice] + (".\n" if i % 11 == 10 else "") for i, choice in enumerate(choices))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and two texts, the same bytes wherever it is made."""
    folder = tmp_path_factory.mktemp("golden")
    save_integer_llama(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "calibration.txt").write_text(invented_text(1500, seed=0))
    (folder / "evaluation.txt").write_text(invented_text(400, seed=1))
    return folder


def perform(name: str, inputs: Path, output: Path) -> dict[str, Any]:
    """One run: its artifacts, files and their sha256 by name, and its perplexities."""
    config = output / "golden.toml"
    formats = ", ".join(f'"{CONFIGS}/formats/{kind}.toml"' for kind in ("mxint", "int", "codebook", "e8p"))
    config.write_text(f"""
extends = [{formats}]
model = "{inputs}/model"
output_dir = "{output}"
tag = "{name}"
device = "cpu"

[calibration]
dataset = "{inputs}/calibration.txt"
num_samples = 4
seq_len = 32
error_tokens = 32

[quantize]
weight = "w4"

[evaluation.perplexity]
datasets = ["{inputs}/evaluation.txt"]
seq_len = 32
batch_size = 4
max_windows = 8
""")
    overrides = [override.format(calibration=inputs / "calibration.txt") if "{calibration}" in override else override
                 for override in RUNS[name]]  # fmt: skip
    results = run(read_config(config, None, overrides))
    artifacts = {}
    for manifest in sorted((output / "store").glob("[!.]*/manifest.json")):
        files = json.loads(manifest.read_text())["files"]
        artifacts[manifest.parent.name] = {
            name: hashlib.sha256((manifest.parent / name).read_bytes()).hexdigest() for name in files
        }
    (row,) = results["perplexity"]
    perplexities = {key: value for key, value in row.items() if isinstance(value, float)}
    return {"artifacts": artifacts, "perplexity": perplexities}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_leaves_what_was_recorded(name, inputs, tmp_path, one_thread, request):
    found = perform(name, inputs, tmp_path)
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {"arithmetic": arithmetic(), "runs": {}}
    if request.config.getoption("--record-golden"):
        recorded["runs"][name] = found
        recorded["arithmetic"] = arithmetic()
        RECORDED.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    expected = recorded["runs"][name]
    if recorded["arithmetic"] == arithmetic():
        assert found["artifacts"] == expected["artifacts"]
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=RELATIVE_TOLERANCE)
