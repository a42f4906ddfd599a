"""What the files say of themselves: config.json's entries, and on the card only commands that run."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import tomli

from lqer.export import Awq, CompressedTensors, Dense, Gptq, Native, Peft, Source, export
from lqer.export.base import Target
from lqer.export.card import configuration
from lqer.export.config_groups import quantization_config
from lqer.formats import MX, Int, MXInt, NumberFormat
from lqer.methods import LqerAct
from lqer.store.records import MANIFEST

DOWN = "model.layers.1.mlp.down_proj"
INT4 = Int(bits=4, block_size=32, symmetric=True)
ZERO_POINTS = Int(bits=4, block_size=32)


def quantization_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


class TestCompressedTensors:
    @pytest.mark.parametrize(
        "weight", [ZERO_POINTS, Int(bits=3, block_size=32), Int(bits=4, block_size="row")], ids=str
    )
    def test_zero_points_of_one_layout_have_the_key_without_which_they_are_not_found(self, checkpoint_of, weight):
        assert quantization_config(Source(checkpoint_of(weight)))["dequantize"] is True

    @pytest.mark.parametrize("weight", [INT4, MXInt(bits=4, block_size=32), MX("mxfp4_e2m1")], ids=str)
    def test_others_do_without_it(self, checkpoint_of, weight):
        assert "dequantize" not in quantization_config(Source(checkpoint_of(weight)))

    def test_linears_of_two_widths_are_named_and_follow_their_own_groups(self, checkpoint_of, mixed, tmp_path):
        """With the key all of them would follow the first group: garbage, without a word."""
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
        eight = Int(bits=8, block_size=32, symmetric=True)
        checkpoint = mixed(checkpoint_of(INT4), checkpoint_of(eight), DOWN)
        assert export(checkpoint, CompressedTensors(), tmp_path / "out").logit_difference == 0
        config = quantization_of(tmp_path / "out")
        groups = {one["weights"]["num_bits"]: one["targets"] for one in config["config_groups"].values()}
        assert groups[8] == [DOWN]
        assert len(groups[4]) == 13
        assert "dequantize" not in config

    def test_the_entry_is_what_readers_look_for(self, checkpoint_of):
        config = quantization_config(Source(checkpoint_of(Int(bits=8, block_size="row", symmetric=True))))
        assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
        assert (config["quantization_status"], config["version"]) == ("compressed", "0.20.0")
        assert "transform_config" not in config
        (group,) = config["config_groups"].values()
        assert group["targets"] == ["Linear"]
        assert group["weights"] == {
            "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None,
            "dynamic": False, "actorder": None,
        }  # fmt: skip

    def test_scales_of_mx_floats_are_said_to_be_bytes(self, checkpoint_of):
        (group,) = quantization_config(Source(checkpoint_of(MX("mxfp8_e4m3"))))["config_groups"].values()
        assert (group["weights"]["scale_dtype"], group["weights"]["type"]) == ("torch.uint8", "float")


class TestGptqAndAwq:
    @pytest.mark.parametrize(
        ("target", "weight", "expected"),
        [
            (Gptq(), INT4, {"bits": 4, "group_size": 32, "sym": True, "format": "gptq", "checkpoint_format": "gptq"}),
            (Gptq(), MXInt(bits=8, block_size=32), {"bits": 8, "sym": True}),
            (Gptq(version="2"), ZERO_POINTS, {"sym": False, "format": "gptq_v2", "checkpoint_format": "gptq_v2"}),
            (Gptq(), Int(bits=4, block_size="row", symmetric=True), {"group_size": -1}),
        ],
    )
    def test_gptq_is_described_twice_and_leaves_columns_in_their_place(
        self, checkpoint_of, target, weight, expected, tmp_path
    ):
        export(checkpoint_of(weight), target, tmp_path / "out", check=False)
        config = quantization_of(tmp_path / "out")
        assert config == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
        always = {"quant_method": "gptq", "desc_act": False, "lm_head": False, "pack_dtype": "int32"}
        assert config.items() >= (always | expected).items()

    def test_awq_names_what_stays_as_it_is(self, checkpoint_of, tmp_path):
        export(checkpoint_of(ZERO_POINTS, skip=(DOWN,)), Awq(), tmp_path / "out", check=False)
        config = quantization_of(tmp_path / "out")
        assert sorted(config.pop("modules_to_not_convert")) == ["lm_head", DOWN]
        assert config == {
            "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"
        }  # fmt: skip


@pytest.mark.parametrize(
    ("target", "weight", "is_served"),
    [
        (Gptq(), INT4, True),
        (Gptq(), Int(bits=8, block_size=32, symmetric=True), True),
        (Gptq(), Int(bits=3, block_size=32, symmetric=True), False),
        (Gptq(), MXInt(bits=4, block_size=16), False),
        (Gptq(version="2"), ZERO_POINTS, False),
        (Awq(), ZERO_POINTS, True),
        (Awq(), MXInt(bits=4, block_size=16), False),
        (CompressedTensors(), ZERO_POINTS, True),
        (CompressedTensors(), MX("mxfp4_e2m1"), True),
        (CompressedTensors(), MX("mxfp6_e2m3"), False),
    ],
)
def test_the_card_names_vllm_where_it_reads_the_layout(checkpoint_of, target: Target, weight: NumberFormat, is_served):
    assert ("vLLM" in target.commands("OUT", Source(checkpoint_of(weight)))) is is_served


@pytest.mark.parametrize(
    ("weight", "dtype", "is_served"),
    [
        (INT4, "", True),
        (MX("mxfp4_e2m1"), ", dtype=torch.bfloat16", True),
        (MX("mxfp6_e2m3"), ", dtype=torch.bfloat16", False),
    ],
)
def test_an_adapter_loads_as_said_and_is_served_over_what_vllm_reads(checkpoint_of, weight, dtype, is_served):
    commands = Peft().commands("OUT", Source(checkpoint_of(weight, method=LqerAct(), rank=4)))
    assert f'from_pretrained("OUT/base"{dtype})' in commands["PEFT"]
    assert ("vLLM" in commands) is is_served
    # Of 8, 16, 32 .. the first that holds it.
    assert "--max-lora-rank 8 " in commands.get("vLLM", "--max-lora-rank 8 ")


@pytest.mark.parametrize(
    "target",
    [Awq(), CompressedTensors(), Dense(), Gptq(), Native(), Peft(), Peft(base="dense"), Peft(base="nf4")],
    ids=str,
)
def test_python_on_the_card_imports_what_it_names(checkpoint_of, target):
    rank = 4 if isinstance(target, Peft) else 0
    source = Source(checkpoint_of(INT4, method=LqerAct(), rank=rank) if rank else checkpoint_of(INT4))
    scripts = [script for script in target.commands("OUT", source).values() if "from_pretrained(" in script]
    assert scripts
    for script in scripts:
        nodes = [*ast.walk(ast.parse(script))]
        imported = {
            alias.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names
        }
        names = [node for node in nodes if isinstance(node, ast.Name)]
        assigned = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        assert {node.id for node in names} - assigned <= imported


def test_of_a_checkpoint_only_weights_are_copied(checkpoint_of, tmp_path):
    """Not its spectra, which readers that load every file of its kind would take for weights."""
    checkpoint = checkpoint_of(MXInt(bits=4), method=LqerAct(), rank=4)
    names = {file.name for file in checkpoint.iterdir()}
    assert {"spectra-00000.safetensors", "layers-00000.json", MANIFEST} <= names
    export(checkpoint, Native(), tmp_path / "out", check=False)
    assert {file.name for file in (tmp_path / "out").glob("*.safetensors")} == {
        "block-00000.safetensors", "block-00001.safetensors", "outside.safetensors", "guard.safetensors"
    }  # fmt: skip
    assert not {file.name for file in (tmp_path / "out").iterdir()} & {"layers-00000.json", MANIFEST}


def test_the_configuration_on_the_card_has_the_formats_in_use_alone():
    quantize = {"weight": "w4", "low_rank": {"format": "x8"}, "override": [{"match": "*.q_proj", "weight": "w3"}]}
    formats = {name: {"kind": "mxint", "bits": int(name[1])} for name in ("w2", "w3", "w4", "x8")}
    shown = configuration({"config": {"model": "m", "quantize": quantize, "formats": formats}})
    found = tomli.loads(shown.partition("```toml\n")[2].removesuffix("```"))
    assert found == {"quantize": quantize, "formats": {name: formats[name] for name in ("w3", "w4", "x8")}}
