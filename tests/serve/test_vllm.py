"""The plug-in of vLLM, with a stand-in of vLLM (tests/common/vllm_standin.py); test_vllm_itself.py has vLLM's own code.

Shapes: T tokens, O out_features.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import re
import sys
from pathlib import Path

import pytest
import torch
import vllm_standin
from safetensors.torch import load_file
from torch import Tensor
from vllm_ranks import build, outputs_of, run_rank

from lqer.checkpoint.load import load_quantized
from lqer.errors import ModelError
from lqer.formats import E8P, Int, MXInt
from lqer.kernels import TritonLinear
from lqer.methods import LqerAct
from lqer.transforms import Hadamard

ROOT = Path(__file__).parents[2]
X8 = MXInt(bits=8, block_size=16)
WEIGHT_ONLY = {"weight": Int(bits=4, block_size=32)}
WITH_FACTORS = {"weight": MXInt(bits=3), "method": LqerAct(), "rank": 16}
ROUNDED = {**WITH_FACTORS, "activation": X8}
WITH_BIASES = {"weight": MXInt(bits=4), "biases": True, "bias": MXInt(bits=8)}


def expected_of(folder: Path) -> dict[str, Tensor]:
    """What the linears of `load_quantized` compute of the inputs of `outputs_of`."""
    block = load_quantized(folder, torch.device("cpu"), torch.float32, "emulate").get_submodule("model.layers.0")
    attention, mlp = block.self_attn, block.mlp
    linears = [(attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,),
               (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)]  # fmt: skip
    found = {}
    for place, (name, joined) in enumerate(zip(("qkv", "o", "gate_up", "down"), linears, strict=True)):
        x = torch.randn(6, joined[0].in_features, generator=torch.Generator().manual_seed(place))
        with torch.no_grad():
            found[name] = torch.cat([linear(x) for linear in joined], -1)
    return found


@pytest.mark.parametrize("made", [WEIGHT_ONLY, WITH_FACTORS, ROUNDED, WITH_BIASES,
                                  {"weight": E8P(bits=2), "transform": Hadamard()}], ids=str)  # fmt: skip
def test_a_layer_computes_what_the_checkpoints_linears_do(native, made):
    folder = native(**made)
    found = outputs_of(folder, 0, 1, lambda tensor: tensor)
    for name, expected in expected_of(folder).items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-5)


def gathered(shares: list[Tensor], widths: list[int], copies: list[int]) -> Tensor:
    """Outputs of joined linears from those of ranks; widths: of each linear on a rank; copies: ranks that hold it."""
    parts = zip(*[share.split(widths, -1) for share in shares], strict=True)
    return torch.cat([torch.cat(part[::copy], -1) for part, copy in zip(parts, copies, strict=True)], -1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_on_gloo_compute_what_the_checkpoints_linears_do(native, ranks, tmp_path):
    folders = [native(**made) for made in (WEIGHT_ONLY, ROUNDED, WITH_BIASES)]
    # Forked from a process that has imported everything, but run nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm_ranks", "lqer.serve.layer"])
    processes = [
        context.Process(target=run_rank, args=(rank, ranks, folders, tmp_path / "store", tmp_path))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    shares = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(ranks)]
    for place, folder in enumerate(folders):
        expected = expected_of(folder)
        for name in ("o", "down"):
            for share in shares:
                torch.testing.assert_close(share[f"{place}.{name}"], expected[name], rtol=0, atol=1e-5)
        q, kv, copies = 128 // ranks, max(32, 64 // ranks), max(1, ranks // 2)
        qkv = gathered([share[f"{place}.qkv"] for share in shares], [q, kv, kv], [1, copies, copies])
        torch.testing.assert_close(qkv, expected["qkv"], rtol=0, atol=1e-5)
        gate_up = gathered([share[f"{place}.gate_up"] for share in shares], [256 // ranks] * 2, [1, 1])
        torch.testing.assert_close(gate_up, expected["gate_up"], rtol=0, atol=1e-5)


def test_kernels_run_where_the_checkpoint_would_have_them(native, monkeypatch):
    """Triton's interpreter takes the GPU's place."""
    monkeypatch.setattr("lqer.serve.layer.choose_backend", lambda *_: "triton")
    folder = native(**WITH_FACTORS)
    with vllm_standin.installed(1, 2):
        from lqer.serve import vllm as plugin

        monkeypatch.setattr(vllm_standin.LinearBase, "__init__", _in_bfloat16(vllm_standin.LinearBase.__init__))
        config, layers = build(folder, plugin)
        vllm_standin.load(layers.values(), load_file(folder / "block-00000.safetensors").items(), config)
        linear = layers["qkv"].lqer_linear
        assert isinstance(linear, TritonLinear), "q, k and v are one"
        x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
        found = layers["qkv"](x).float()
    q, k, v = expected_rows(folder, x)
    expected = torch.cat([q[:, 64:], k[:, 32:], v[:, 32:]], -1)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def _in_bfloat16(original):
    def init(self, inputs, outputs, sizes, bias, dtype, config, prefix):
        original(self, inputs, outputs, sizes, bias, torch.bfloat16, config, prefix)

    return init


def expected_rows(folder: Path, x: Tensor) -> list[Tensor]:
    model = load_quantized(folder, torch.device("cpu"), torch.float32, "emulate")
    attention = model.get_submodule("model.layers.0.self_attn")
    return [linear(x.float()) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]


@pytest.fixture
def plugin():
    with vllm_standin.installed():
        yield importlib.import_module("lqer.serve.vllm")


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_it_registers_under_the_checkpoints_name_as_often_as_called():
    with vllm_standin.installed() as registered:
        plugin = importlib.import_module("lqer.serve.vllm")
        plugin.register()
        plugin.register()
        assert registered == {"lqer": plugin.LqerVllmConfig}


def test_the_package_names_it_to_vllm():
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"lqer": "lqer.serve.vllm:register"}


def test_only_one_file_imports_vllm():
    imports = re.compile(r"^\s*(import|from) vllm", re.MULTILINE)
    assert [path.name for path in (ROOT / "lqer").rglob("*.py") if imports.search(path.read_text())] == ["vllm.py"]


def test_the_guard_is_no_weight(plugin, native):
    config = plugin.LqerVllmConfig.from_config(config_of(native(**WEIGHT_ONLY)))
    names = ["model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight.codes", "model.norm.weight"]
    mapped = config.get_checkpoint_weight_mapper().apply((name, torch.empty(0)) for name in names)
    assert [name for name, _ in mapped] == ["model.layers.0.mlp.down_proj.weight_codes", "model.norm.weight"]


def test_a_linear_that_was_skipped_is_not_quantized(plugin, native):
    _, layers = build(native(**WEIGHT_ONLY, skip=("model.layers.0.self_attn.o_proj",)), plugin)
    assert type(layers["o"].quant_method) is vllm_standin.UnquantizedLinearMethod
    assert type(layers["down"].quant_method) is plugin.LqerLinearMethod


def test_a_joined_linear_that_was_skipped_is_refused(plugin, native):
    with pytest.raises(ModelError, match=r"self_attn.q_proj, which is quantized, with .*v_proj, which is not"):
        build(native(**WEIGHT_ONLY, skip=("model.layers.0.self_attn.v_proj",)), plugin)


def test_a_checkpoint_that_is_not_native_is_refused(plugin):
    with pytest.raises(ModelError, match='"lqer export CHECKPOINT native OUT"'):
        plugin.LqerVllmConfig.from_config({"quant_method": "lqer", "details": "lqer.json"})


def test_rounded_attention_is_refused(plugin, native):
    described = {**config_of(native(**WEIGHT_ONLY)), "attention": {"format": X8.to_dict()}}
    with pytest.raises(ModelError, match="attention cannot round its operands"):
        plugin.LqerVllmConfig.from_config(described)


def test_a_bias_that_the_layer_has_no_place_for_is_refused(plugin, native):
    folder = native(**WITH_BIASES)
    config = plugin.LqerVllmConfig.from_config(config_of(folder))
    layer = vllm_standin.RowParallelLinear(128, 128, quant_config=config, prefix="model.layers.0.self_attn.o_proj")
    with pytest.raises(ModelError, match="o_proj has a bias, and vLLM's layer has none"):
        vllm_standin.load([layer], load_file(folder / "block-00000.safetensors").items(), config)


def test_linears_within_another_layer_are_refused(plugin, native):
    config = plugin.LqerVllmConfig.from_config(config_of(native(**WEIGHT_ONLY)))
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "") is None
    with pytest.raises(ModelError, match="vLLM runs it within Embedding"):
        config.get_quant_method(torch.nn.Embedding(2, 2), "model.layers.0.mlp")


def test_an_input_that_is_rotated_at_run_time_is_rotated_on_one_rank_only(native):
    folder = native(**WEIGHT_ONLY)
    for ranks in (1, 2):
        with vllm_standin.installed(0, ranks):
            plugin = importlib.import_module("lqer.serve.vllm")
            config = plugin.LqerVllmConfig.from_config(config_of(folder))
            rotated = type("Config", (), {"online_rotations": {"model.layers.0.mlp.down_proj": None}})
            config.maybe_update_config("", hf_config=rotated)
            if ranks == 2:
                with pytest.raises(ModelError, match="down_proj: its input is rotated as a whole"):
                    vllm_standin.RowParallelLinear(256, 128, quant_config=config, prefix="model.layers.0.mlp.down_proj")
                continue
            layer = vllm_standin.RowParallelLinear(256, 128, quant_config=config, prefix="model.layers.0.mlp.down_proj")
            weights = load_file(folder / "block-00000.safetensors")
            vllm_standin.load([layer], weights.items(), config)
            x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
            expected = layer.lqer_linear(config.rotations["model.layers.0.mlp.down_proj"](x))
            assert torch.equal(layer(x), expected)
            assert not torch.allclose(layer(x), layer.lqer_linear(x))
