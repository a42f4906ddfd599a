"""GGUF files in llama.cpp itself, where a wheel of it is installed."""

from __future__ import annotations

import pytest
from compare_llama_cpp import compare

from lqer.export import Gguf, export
from lqer.formats import MXInt
from lqer.methods import LqerAct
from lqer.transforms import Hadamard


@pytest.fixture(autouse=True)
def _library():
    pytest.importorskip("cyllama", reason="cyllama (llama.cpp) is not installed")


def test_a_file_in_float32_computes_what_the_checkpoint_does(checkpoint_of, template, windows_WT, tmp_path):
    checkpoint = checkpoint_of(MXInt(bits=3), method=LqerAct(), rank=4, transform=Hadamard())
    export(checkpoint, Gguf(template=str(template), dtype="float32"), tmp_path / "out")
    found = compare(tmp_path / "out" / "model.gguf", checkpoint, windows_WT)
    assert found["llama.cpp"] == pytest.approx(found["checkpoint"], rel=1e-4)
