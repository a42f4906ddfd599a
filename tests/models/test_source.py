"""Finding a model's weights, its decoder blocks and their linears; refusing what must not be opened."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import gguf
import pytest
import torch
from mixtures import random_mixture
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaForCausalLM,
)

import lqer.models.source
from lqer.errors import HubError, ModelError
from lqer.models.source import load_model, pick_device, pick_dtype, resolve_model
from lqer.models.structure import block_linears, find_blocks, prepare_model

CPU = torch.device("cpu")


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, crater: Path):
        self.crater = crater

    def __reduce__(self):
        return (Path.touch, (self.crater,))


@pytest.fixture
def pickled(random_model, tmp_path) -> Path:
    """A model whose weights are a pickle that would write tmp_path/crater."""
    folder = tmp_path / "pickled"
    random_model("llama").config.save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "crater")))
    return folder


def test_a_pickle_alone_is_refused_and_not_opened(pickled, tmp_path):
    with pytest.raises(ModelError, match=r"has neither .* \(pickles are not read\)"):
        resolve_model(str(pickled))
    assert not (tmp_path / "crater").exists()


def test_a_pickle_beside_unrelated_safetensors_is_refused_and_not_opened(pickled, tmp_path):
    save_file({"x": torch.zeros(1)}, pickled / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"has neither model\.safetensors nor"):
        resolve_model(str(pickled))
    assert not (tmp_path / "crater").exists()


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./here", "a/b/c", "/no/such.gguf", "/no/such.safetensors", "no/such.safetensors"]
)
def test_a_path_that_does_not_exist_is_refused_as_such(name):
    with pytest.raises(ModelError, match="model: no such file"):
        resolve_model(name)


def test_a_missing_file_is_not_replaced_by_its_folder(random_model, tmp_path):
    random_model("llama").save_pretrained(tmp_path)
    assert resolve_model(str(tmp_path / "model.safetensors")).path == str(tmp_path)
    with pytest.raises(ModelError, match="model: no such file"):
        resolve_model(str(tmp_path / "other.safetensors"))


def test_a_name_the_hub_does_not_know_is_reported_in_one_line(monkeypatch):
    def unreachable(name, revision, trust_remote_code):
        raise OSError(f"{name} is not there\nTraceback of many lines")

    monkeypatch.setattr(lqer.models.source, "hub_out_of_reach", lambda: None)
    monkeypatch.setattr(lqer.models.source.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(HubError, match="model: someone/model is not a local folder, and the hub refuses it") as error:
        resolve_model("someone/model")
    assert "\n" not in str(error.value)


def test_the_fingerprint_follows_the_weights_not_the_folder(random_model, tmp_path):
    model = random_model("llama")
    for name in ("a", "b", "c"):
        model.save_pretrained(tmp_path / name)
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-6
    save_file(tensors, tmp_path / "c" / "model.safetensors", metadata={"format": "pt"})
    a, b, c = (resolve_model(str(tmp_path / name)).fingerprint for name in ("a", "b", "c"))
    assert a == b
    assert a != c


def test_a_model_is_loaded_for_inference_in_the_dtype_asked_for(random_model, tmp_path):
    random_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    source = resolve_model(str(tmp_path))
    assert load_model(source, "auto", CPU).dtype == torch.bfloat16
    model = load_model(source, torch.float32, CPU)
    assert model.dtype == torch.float32
    assert not model.training


def test_the_dtype_of_activations_is_float32_on_a_cpu_and_the_checkpoints_elsewhere(random_model, tmp_path):
    random_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    source = resolve_model(str(tmp_path))
    assert pick_dtype("auto", source, CPU) == torch.float32
    assert pick_dtype("auto", source, torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("float16", source, CPU) == torch.float16


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto") == CPU
    with pytest.raises(ModelError, match="'cuda' is not available: this machine has 0 usable GPUs"):
        pick_device("cuda")
    with pytest.raises(ModelError, match="'gpu' is not supported"):
        pick_device("gpu")


@torch.no_grad()
def test_gpt2s_transposed_linears_become_linears_with_the_same_result():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    ids_BT = torch.randint(80, (2, 12))
    own_logits = model(ids_BT).logits
    prepare_model(model)
    c_fc = model.transformer.h[0].mlp.c_fc
    assert isinstance(c_fc, nn.Linear)
    assert (c_fc.in_features, c_fc.out_features) == (32, 128)
    torch.testing.assert_close(model(ids_BT).logits, own_logits, rtol=1e-5, atol=1e-6)


def test_the_declared_blocks_win_over_larger_lists(random_model):
    model = random_model("llama")
    model.model.memory = nn.ModuleList([nn.Embedding(512, 512)])
    assert find_blocks(model)[0] == "model.layers"


def test_a_second_stack_of_blocks_counts_as_not_quantized(random_model):
    model = random_model("llama")
    model.model.more = nn.ModuleList([nn.Sequential(nn.Linear(32, 32))])
    with pytest.raises(
        ModelError, match=r"are not in nn\.Linear modules of model\.layers.*, as model\.more\.0\.0\.weight"
    ):
        find_blocks(model)


def test_head_embedding_projections_and_towers_of_other_inputs_do_not_count(random_model):
    find_blocks(random_model("opt-350m"))
    model = random_model("llama")
    tower = random_model("gpt2")
    tower.main_input_name = "pixel_values"
    model.model.vision = tower
    assert find_blocks(model)[0] == "model.layers"


def test_a_block_lists_its_linears_by_name(random_model):
    shapes = {
        name: tuple(linear.weight.shape)
        for name, linear in block_linears(random_model("llama").model.layers[0]).items()
    }
    assert shapes == {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (64, 32),
        "mlp.up_proj": (64, 32),
        "mlp.down_proj": (32, 64),
    }


def test_experts_outside_the_registry_are_refused_by_name():
    config = Llama4TextConfig(
        vocab_size=80,
        hidden_size=16,
        intermediate_size=16,
        intermediate_size_mlp=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    with pytest.raises(ModelError, match=r"as model\.layers\.0\.feed_forward\.experts\.\w+ of Llama4TextExperts"):
        find_blocks(Llama4ForCausalLM(config))


def test_convolutions_over_neighbouring_tokens_are_kept_and_do_not_count(random_model):
    model = random_model("llama")
    model.model.layers[0].self_attn.conv = nn.Conv1d(512, 512, 4, groups=8)
    assert find_blocks(model)[0] == "model.layers"


def test_a_model_without_a_list_of_blocks_is_refused():
    with pytest.raises(ModelError, match="Linear has no ModuleList of decoder blocks"):
        find_blocks(nn.Linear(2, 2))


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path: Path, model: LlamaForCausalLM, announced: int | None = None) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(announced or config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in GGUF_NAMES.items()}
    for ours, theirs in names.items():
        weight = model.get_submodule(ours).weight.detach()
        if theirs.endswith(("attn_q", "attn_k")):
            # GGUF keeps the halves that rotary embedding pairs side by side.
            heads = config.num_attention_heads if theirs.endswith("attn_q") else config.num_key_value_heads
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{theirs}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_a_gguf_file_is_loaded_as_the_model_it_holds(random_model, windows_WT, tmp_path):
    model = random_model("llama")
    write_gguf(tmp_path / "tiny.gguf", model)
    source = resolve_model(str(tmp_path / "tiny.gguf"))
    assert source.description == "GGUF file tiny.gguf"
    loaded = load_model(source, torch.float32, CPU)
    torch.testing.assert_close(loaded(windows_WT).logits, model(windows_WT).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("layers", "stored", "message"), [(3, 2, "has no tensor"), (1, 2, "does not use")])
def test_a_gguf_file_with_other_blocks_than_it_announces_is_refused(random_model, tmp_path, layers, stored, message):
    model = random_model("llama")
    assert model.config.num_hidden_layers == stored
    write_gguf(tmp_path / "tiny.gguf", model, announced=layers)
    with pytest.raises(ModelError, match=message):
        load_model(resolve_model(str(tmp_path / "tiny.gguf")), torch.float32, CPU)


# Of OCP MX (v1.0), by code: E2M1.
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def test_experts_in_mxfp4_are_dequantized_as_they_are_loaded(tmp_path):
    random_mixture("gpt_oss", hidden_size=64, intermediate_size=32).to(torch.bfloat16).save_pretrained(tmp_path)
    file, generator = tmp_path / "model.safetensors", torch.Generator().manual_seed(0)
    tensors, expected = load_file(file), {}
    for name in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        codes = torch.randint(16, (experts, rows, columns // 32, 32), generator=generator)
        exponents = torch.randint(120, 125, (experts, rows, columns // 32), generator=generator)
        tensors[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        tensors[f"{name}_scales"] = exponents.to(torch.uint8)
        expected[name] = (torch.tensor(E2M1)[codes] * 2.0 ** (exponents - 127).unsqueeze(-1)).flatten(2)
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    experts = load_model(resolve_model(str(tmp_path)), "auto", CPU).model.layers[1].mlp.experts
    gate_up_EOI, down_EOI = (expected[f"model.layers.1.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
    for index in range(4):
        expert = experts.get_submodule(str(index))
        assert torch.equal(expert.gate_proj.weight.float(), gate_up_EOI[index, ::2])
        assert torch.equal(expert.up_proj.weight.float(), gate_up_EOI[index, 1::2])
        assert torch.equal(expert.down_proj.weight.float(), down_EOI[index])
