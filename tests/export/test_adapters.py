"""Low-rank factors as an adapter, and NF4 bases under them: the values that other libraries read, without these.

FACTORS are A, B, x and (x A) B of a linear with 6 inputs, 4 outputs and rank 2.
"""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from lqer.export.gguf_adapter import write_adapter
from lqer.export.gguf_names import GgufNames, interleaved
from lqer.export.nf4 import nf4_config, nf4_tensors
from lqer.export.peft import adapter_config, lora_factors
from lqer.export.source import Linear, LinearSpec, Source
from lqer.formats import Int, NormalFloat
from lqer.formats.normalfloat import levels
from lqer.methods import LoftQ

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture
def factors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"a_IR": torch.randn(32, 3, generator=generator), "b_RO": torch.randn(3, 16, generator=generator)}


def linear(name: str, factors: dict[str, torch.Tensor]) -> Linear:
    number_format = Int(bits=4, block_size=32)
    weight_OI = number_format.quantize(torch.zeros(16, 32), axis=1)
    return Linear(LinearSpec(name, number_format, 16, 32, rank=3), weight_OI, **factors, bias_O=None, rotation=None)


def test_the_two_matrices_of_peft_give_the_product_of_the_factors(factors):
    found = lora_factors(linear(UP, factors))
    assert (found["lora_A"].shape, found["lora_B"].shape) == ((3, 32), (16, 3))
    x_TI = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    expected_TO = x_TI @ factors["a_IR"] @ factors["b_RO"]
    torch.testing.assert_close(x_TI @ found["lora_A"].T @ found["lora_B"].T, expected_TO)


def test_the_adapter_of_peft_is_for_inference_and_says_nothing_that_vllm_refuses():
    config = adapter_config({UP: LinearSpec(UP, Int(bits=4), 8, 8, 3)})
    assert (config["inference_mode"], config["init_lora_weights"], config["bias"]) == (True, True, "none")
    assert "modules_to_save" not in config


@pytest.mark.parametrize(("architecture", "is_reordered"), [("llama", True), ("qwen2", False), ("qwen3", False)])
def test_rows_of_b_follow_those_of_the_weight_in_gguf(factors, tmp_path, architecture, is_reordered):
    path = tmp_path / "adapter.gguf"
    write_adapter(path, GgufNames(architecture, 1, HEADS), [linear(Q, factors), linear(UP, factors)])
    reader = gguf.GGUFReader(path)
    assert reader.fields["adapter.lora.alpha"].contents() == 0.0
    assert (reader.fields["general.type"].contents(), reader.fields["adapter.type"].contents()) == ("adapter", "lora")
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    b_OR = factors["b_RO"].T.numpy()
    np.testing.assert_array_equal(found["blk.0.ffn_up.weight.lora_b"], b_OR)
    order = interleaved(16, 2).numpy() if is_reordered else np.arange(16)
    np.testing.assert_array_equal(found["blk.0.attn_q.weight.lora_b"], b_OR[order])
    np.testing.assert_array_equal(found["blk.0.attn_q.weight.lora_a"], factors["a_IR"].T.numpy())


@pytest.fixture(scope="module")
def nf4(checkpoint_of) -> Source:
    widths = {"hidden_size": 64, "intermediate_size": 128}
    return Source(checkpoint_of(NormalFloat(bits=4), method=LoftQ(), rank=4, sizes=widths))


def test_the_first_of_two_nf4_codes_is_in_the_high_half_of_a_byte(nf4):
    linears, _ = next(iter(nf4.read()))
    for one in linears:
        tensors = nf4_tensors(one)
        high, low = tensors["weight"].flatten() >> 4, tensors["weight"].flatten() & 15
        codes = torch.stack([high, low], dim=1).view(-1, 64)
        values = torch.tensor(levels(4))[codes.long()] * tensors["weight.absmax"][:, None]
        torch.testing.assert_close(values.view(one.weight_OI.shape), one.weight_OI.dequantize(), rtol=1e-6, atol=0)


def test_scales_of_nf4_are_not_quantized_once_more(nf4):
    config = nf4_config(nf4)
    assert config["bnb_4bit_use_double_quant"] is False
    assert config["bnb_4bit_quant_type"] == "nf4"
