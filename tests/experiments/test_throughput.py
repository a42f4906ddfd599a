"""Throughput as a script measures it, on whatever device is here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_throughput import measure

from lqer.formats import E8P
from lqer.methods import RoundingOnly
from lqer.transforms import Hadamard

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "experiments/benchmark_throughput.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_call_is_one_token_of_the_whole_model(random_model):
    model = random_model("llama")
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    found = measure("tiny", "torch", model, calls=7, graph=True)
    hook.remove()
    assert len(seen) == 5 + 7
    assert all(args[0].shape == (1, 1) and kwargs == {"use_cache": False} for args, kwargs in seen)
    assert found.milliseconds * found.tokens_per_second == pytest.approx(1000)
    stored = {t.data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    assert found.bytes == sum(stored.values())


def test_a_checkpoint_is_measured_beside_its_original(random_model, run_stages, plan, tmp_path):
    model = random_model("llama")
    model.save_pretrained(tmp_path / "original")
    checkpoint = run_stages(
        model, replace(plan, method=RoundingOnly(), rank=0, weight=E8P(2), transform=Hadamard())
    ).checkpoint
    done = run(str(checkpoint.path), "--original", str(tmp_path / "original"), "--calls", "3", "--json",
               str(tmp_path / "rows.json"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["model"], row["backend"]) for row in rows] == [("quantized", "emulate"), ("original", "torch")]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert done.stdout.count("| quantized | emulate |") == 1


def test_what_cannot_be_measured_is_said_in_one_line(tmp_path):
    done = run(str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path} is not a quantized checkpoint: it has no lqer.json\n"
