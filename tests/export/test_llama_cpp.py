"""GGUF files in llama.cpp itself, where a wheel of it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compare_llama_cpp import compare

from lqer.checkpoint.load import load_quantized
from lqer.export import Gguf, export
from lqer.formats import MXInt
from lqer.methods import LqerAct
from lqer.transforms import Hadamard

PROMPT = [5, 9, 3, 40, 22, 17]


def test_a_file_in_float32_computes_what_the_checkpoint_does(checkpoint_of, template, windows_WT, tmp_path):
    pytest.importorskip("cyllama", reason="cyllama (llama.cpp) is not installed")
    checkpoint = checkpoint_of(MXInt(bits=3), method=LqerAct(), rank=4, transform=Hadamard())
    export(checkpoint, Gguf(template=str(template), dtype="float32"), tmp_path / "out")
    found = compare(tmp_path / "out" / "model.gguf", checkpoint, windows_WT)
    assert found["llama.cpp"] == pytest.approx(found["checkpoint"], rel=1e-4)


def next_token(model: Path, adapter: Path | None) -> dict[int, float]:
    """The logarithms of the probabilities of the likeliest tokens after `PROMPT`."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.cpuparams.n_threads = str(model), 64, 1
    if adapter is not None:
        info = xllamacpp.CommonAdapterLoraInfo()
        info.path, info.scale = str(adapter), 1.0
        parameters.lora_adapters = [info]
    request = {"prompt": PROMPT, "n_predict": 1, "n_probs": 5, "temperature": 0}
    answer = xllamacpp.Server(parameters).handle_completions(request)
    return {row["id"]: row["logprob"] for row in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}


@torch.no_grad()
def test_factors_as_an_adapter_give_the_checkpoints_probabilities(checkpoint_of, template, tmp_path):
    pytest.importorskip("xllamacpp", reason="xllamacpp (llama.cpp) is not installed")
    checkpoint = checkpoint_of(MXInt(bits=3, block_size=32), method=LqerAct(), rank=4)
    export(checkpoint, Gguf(template=str(template)), tmp_path / "out", check=False)
    logits_TV = load_quantized(checkpoint, torch.device("cpu"))(torch.tensor([PROMPT])).logits[0]
    expected_V = logits_TV[-1].log_softmax(-1)

    def farthest(adapter: Path | None) -> float:
        found = next_token(tmp_path / "out" / "model.gguf", adapter)
        return max(abs(value - float(expected_V[token])) for token, value in found.items())

    # llama.cpp rounds inputs to 8 bits.
    assert farthest(tmp_path / "out" / "adapter.gguf") < 0.05
    assert farthest(None) > 0.2
