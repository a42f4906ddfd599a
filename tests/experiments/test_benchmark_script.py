"""The command on a machine without a GPU, and the linears of the decoder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama
from kernel_benchmark.decoder import block_linears

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [([], "needs an NVIDIA GPU"), (["--only", "a,z"], "'z' is not one of a, b, c, d, e, f, g, h, i, j, k, l, extra")],
)
def test_no_gpu_and_unknown_groups_exit_with_2_and_one_line(options, said):
    done = run("experiments/benchmark_kernels.py", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_it_imports_without_the_packages_of_the_pipeline():
    absent = ("pydantic", "datasets", "lm_eval", "gemlite", "humming", "transformers")
    done = run(
        "-c",
        f"import sys; sys.modules.update(dict.fromkeys({absent}));"
        "sys.path.insert(0, 'experiments'); import benchmark_kernels; print('imported')",
    )
    assert done.stdout == "imported\n", done.stderr


def test_the_linears_of_the_blocks_do_not_include_the_output_layer():
    model = tiny_llama()
    linears = [linear for _, _, linear in block_linears(model)]
    assert len(linears) == len(set(map(id, linears))) == 7 * len(model.model.layers)
    assert all(linear is not model.lm_head for linear in linears)
    assert all(isinstance(getattr(parent, name), torch.nn.Linear) for parent, name, _ in block_linears(model))
