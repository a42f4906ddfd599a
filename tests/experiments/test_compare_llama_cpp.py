"""The inputs of llama.cpp's matrices, rounded as its kernels round them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from compare_llama_cpp import INPUTS, q8_0, round_inputs, roundings
from torch import nn

from lqer.nn.linear import QuantizedLinear

Types = gguf.GGMLQuantizationType


def test_blocks_of_32_are_those_that_gguf_makes():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    expected = gguf.dequantize(gguf.quantize(x.numpy(), Types.Q8_0), Types.Q8_0)
    # gguf multiplies by 1 / d where llama.cpp multiplies by 127 / max|x|: a code at a tie may be another.
    is_equal = torch.from_numpy(expected) == q8_0(x)
    assert is_equal.float().mean() > 0.999
    torch.testing.assert_close(q8_0(x), torch.from_numpy(expected), rtol=0, atol=float(x.abs().max()) / 127)


def test_a_step_is_rounded_after_its_codes():
    x = torch.zeros(32)
    x[0], x[1] = 1.0, 0.5039  # 63.995 of 1/127: code 64 whatever the step is
    step = float(torch.tensor(1 / 127).half())
    assert q8_0(x)[:2].tolist() == pytest.approx([127 * step, 64 * step], rel=1e-7)
    assert not q8_0(torch.zeros(32)).any()


@pytest.mark.parametrize(("of_blocks", "of_head"), [(Types.Q5_0, Types.F16), (Types.F32, Types.F32)])
def test_what_is_rounded_is_read_from_the_file(tmp_path, of_blocks, of_head):
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for name, kind in (("blk.0.attn_q.weight", of_blocks), ("token_embd.weight", of_head)):
        writer.add_tensor(name, gguf.quantize(np.ones((32, 32), dtype=np.float32), kind), raw_dtype=kind)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(32, dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    assert roundings(file) == (INPUTS[of_blocks], INPUTS[of_head])


def test_linears_and_the_head_round_their_inputs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = QuantizedLinear(torch.eye(32), None, None, None, None)
            self.head = nn.Linear(32, 32, bias=False)
            nn.init.eye_(self.head.weight)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    model, x = Model(), torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    round_inputs(model, q8_0, INPUTS[Types.F16])
    assert torch.equal(model.linear(x), q8_0(x))
    assert torch.equal(model.head(x), x.half().float())
