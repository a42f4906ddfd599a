"""An export in a process that cannot import lqer says the same greedy tokens as the checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lqer.export import CompressedTensors, export
from lqer.formats import Int
from lqer.methods import GptqMethod
from lqer.models.structure import prepare_model
from lqer.rounding import Gptq

SCRIPT = Path(__file__).parents[2] / "experiments" / "greedy_tokens.py"


def greedy_tokens(folder: Path, has_lqer: bool) -> list[str]:
    lines = [
        "import runpy, sys",
        "" if has_lqer else "sys.modules['lqer'] = None",
        f"sys.argv = ['', {str(folder)!r}]",
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_stories15m_in_compressed_tensors_generates_the_same_without_lqer(assets, run_stages, rounded, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    model = AutoModelForCausalLM.from_pretrained(assets / "models" / "stories15M", dtype=torch.float32).eval()
    prepare_model(model)
    plan = rounded(Int(bits=4, block_size=128), method=GptqMethod(), rounding=Gptq())
    checkpoint = run_stages(model, plan).checkpoint.path
    export(checkpoint, CompressedTensors(), tmp_path / "out", check=False)
    expected = greedy_tokens(checkpoint, has_lqer=True)
    assert len(expected) == 64
    assert len(set(expected)) > 8
    assert greedy_tokens(tmp_path / "out", has_lqer=False) == expected
