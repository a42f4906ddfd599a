"""The plug-in in vLLM's own code, where that can be imported (0.33.0 is what it was written against)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lqer.checkpoint.load import load_quantized
from lqer.formats import E8P, Int, MXInt
from lqer.methods import LqerAct
from lqer.transforms import Hadamard

ROOT = Path(__file__).parents[2]
COMMON = ROOT / "tests/common"
TOKENS = [5, 9, 3, 40, 22, 17, 61, 8, 30, 12]
X8 = MXInt(bits=8, block_size=16)

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed", allow_module_level=True)


@pytest.mark.parametrize(
    ("made", "ranks"),
    [
        ({"weight": Int(bits=4, block_size=32)}, 1),
        ({"weight": Int(bits=4, block_size=32)}, 2),
        ({"weight": MXInt(bits=3), "method": LqerAct(), "rank": 16, "activation": X8}, 1),
        ({"weight": MXInt(bits=3), "method": LqerAct(), "rank": 16, "activation": X8}, 2),
        ({"weight": MXInt(bits=3), "method": LqerAct(), "rank": 16, "activation": X8}, 4),
        ({"weight": MXInt(bits=4), "bias": MXInt(bits=8), "biases": True}, 2),
        ({"weight": E8P(bits=2), "transform": Hadamard()}, 1),
    ],
    ids=str,
)
def test_a_native_export_has_the_checkpoints_logits_in_vllm(native, made, ranks, tmp_path):
    folder, out = native(**made), tmp_path / "logits.safetensors"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{COMMON}"}
    script = [sys.executable, str(COMMON / "vllm_model.py"), str(folder)]
    processes = [
        subprocess.Popen([*script, str(rank), str(ranks), str(tmp_path / "store"), str(out)], env=environment,
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors
    model = load_quantized(folder, torch.device("cpu"), torch.float32, "emulate")
    with torch.no_grad():
        expected_TV = model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(load_file(out)["logits"], expected_TV, rtol=0, atol=1e-4)
