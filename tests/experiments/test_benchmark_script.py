"""The commands on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["benchmark_kernels.py"], "needs an NVIDIA GPU"),
        (["benchmark_kernels.py", "--only", "a,z"], "'z' is not one of a, b, c, d, e, f, h, i, j, k, l, m, extra"),
        (["benchmark_decoder.py"], "needs an NVIDIA GPU"),
        (["benchmark_decoder.py", "int5"], "'int5' is not one of bf16, "),
        (["benchmark_evaluation.py"], "needs an NVIDIA GPU"),
        (["benchmark_evaluation.py", "int5"], "'int5' is not one of bf16, "),
        (["benchmark_rotations.py"], "needs an NVIDIA GPU"),
    ],
)
def test_no_gpu_and_unknown_names_exit_with_2_and_one_line(command, said):
    done = run(f"experiments/{command[0]}", *command[1:])
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
