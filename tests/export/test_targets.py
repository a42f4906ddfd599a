"""Every target on checkpoints of tiny models: what it writes computes what the checkpoint does, or it refuses."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lqer.checkpoint.load import load_quantized
from lqer.errors import ConfigError, ExportError
from lqer.export import CompressedTensors, Dense, Gguf, Mlx, Peft, Source, export, first_unsupported
from lqer.export.mlx import quantization
from lqer.export.nf4 import nf4_tensors
from lqer.export.peft import adapter_config
from lqer.export.source import LinearSpec
from lqer.formats import MX, Int, MXInt, NormalFloat
from lqer.methods import LoftQ, LqerAct
from lqer.models.structure import ONLINE_ROTATIONS
from lqer.transforms import Hadamard

CPU = torch.device("cpu")
INT8_ROW = Int(bits=8, block_size="row", symmetric=True)
INT8_TOKEN = Int(bits=8, block_size="row", symmetric=True, scale_dtype="float32")
MXINT8 = MXInt(bits=8)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


class TestDense:
    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gpt-neox"])
    def test_a_model_without_factors_is_exact_also_where_weights_are_stored_transposed(
        self, checkpoint_of, architecture, tmp_path
    ):
        check = export(checkpoint_of(NormalFloat(bits=4), architecture), Dense(), tmp_path / "out")
        assert check.logit_difference == 0

    @torch.no_grad()
    def test_factors_are_merged_and_rotations_folded(self, checkpoint_of, edited, windows_WT, tmp_path):
        checkpoint = checkpoint_of(MXInt(bits=3), method=LqerAct(), rank=4, transform=Hadamard())
        rotated = "model.layers.1.mlp.down_proj"
        checkpoint = edited(
            checkpoint, "config.json", lambda config: config.update({ONLINE_ROTATIONS: {rotated: None}})
        )
        export(checkpoint, Dense(), tmp_path / "out", check=False)
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(exported(windows_WT).logits, load_quantized(checkpoint, CPU)(windows_WT).logits)
        assert config_of(tmp_path / "out").keys().isdisjoint({ONLINE_ROTATIONS, "quantization_config"})

    def test_rounding_of_inputs_is_dropped_and_said(self, checkpoint_of, tmp_path, caplog):
        checkpoint = checkpoint_of(MXInt(bits=4), activation=MXInt(bits=3))
        check = export(checkpoint, Dense(), tmp_path / "out")
        assert check.logit_difference == 0
        assert check.whole_perplexity != check.perplexity
        assert "activation quantization of 14 linears is not exported" in caplog.text
        assert "Inputs are not rounded here" in (tmp_path / "out" / "README.md").read_text()

    def test_other_tensors_keep_their_dtype(self, checkpoint_of, tmp_path):
        export(checkpoint_of(MXInt(bits=4)), Dense(dtype="bfloat16"), tmp_path / "out")
        stored = load_file(tmp_path / "out" / "model.safetensors")
        assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
        assert stored["model.embed_tokens.weight"].dtype == torch.float32


class TestCompressedTensors:
    @pytest.fixture(autouse=True)
    def _library(self):
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

    @pytest.mark.parametrize(
        "weight",
        [
            MXInt(bits=4, block_size=32), MXInt(bits=3), Int(bits=4, block_size=32, symmetric=True),
            Int(bits=3, block_size=32), Int(bits=4, block_size="row"), INT8_ROW, MX("mxint8"),
            MX("mxfp4_e2m1"), MX("mxfp6_e2m3"), MX("mxfp8_e4m3"),
        ],
        ids=str,
    )  # fmt: skip
    def test_it_loads_in_transformers_and_computes_the_same(self, checkpoint_of, weight, tmp_path):
        check = export(checkpoint_of(weight), CompressedTensors(), tmp_path / "out")
        assert check.logit_difference == 0
        assert check.dtype == ("bfloat16" if "mxfp" in str(weight) else "float32")

    def test_a_skipped_linear_and_the_head_are_ignored(self, checkpoint_of, tmp_path):
        skipped = "model.layers.0.mlp.down_proj"
        check = export(checkpoint_of(INT8_ROW, skip=(skipped,)), CompressedTensors(), tmp_path / "out")
        assert check.logit_difference == 0
        assert sorted(config_of(tmp_path / "out")["quantization_config"]["ignore"]) == ["lm_head", skipped]

    def test_int8_inputs_of_a_token_are_carried(self, checkpoint_of, tmp_path):
        check = export(checkpoint_of(INT8_ROW, activation=INT8_TOKEN), CompressedTensors(), tmp_path / "out")
        assert check.whole_perplexity == check.perplexity
        assert check.logit_difference > 0
        (group,) = config_of(tmp_path / "out")["quantization_config"]["config_groups"].values()
        assert group["format"] == "int-quantized"
        assert group["input_activations"]["strategy"] == "token"


class TestSeveralWidthsWithZeroPoints:
    DOWN = "model.layers.1.mlp.down_proj"

    @pytest.fixture
    def checkpoint(self, checkpoint_of, mixed):
        return mixed(checkpoint_of(Int(bits=4, block_size=32)), checkpoint_of(Int(bits=3, block_size=64)), self.DOWN)

    def test_compressed_tensors_decodes_them_for_vllm_where_transformers_does_not_load_them(self, checkpoint, tmp_path):
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
        assert "transformers does not load (compressed-tensors takes it with --engine=vllm)" in refusal(
            checkpoint, CompressedTensors()
        )
        check = export(checkpoint, CompressedTensors(engine="vllm"), tmp_path / "out")
        assert check.logit_difference == 0
        config = config_of(tmp_path / "out")["quantization_config"]
        described = [
            (one["weights"]["num_bits"], one["weights"]["group_size"]) for one in config["config_groups"].values()
        ]
        assert described == [(4, 32), (3, None)]
        assert "dequantize" not in config
        assert "transformers does not load zero points" in (tmp_path / "out" / "README.md").read_text()
        with pytest.raises(RuntimeError, match="size"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    def test_zero_points_that_vllm_cannot_join_are_refused(self, checkpoint_of):
        checkpoint = checkpoint_of(Int(bits=3, block_size=32), sizes={"num_key_value_heads": 1})
        assert "8 zero points of 3 bits do not fill words of 32" in refusal(
            checkpoint, CompressedTensors(engine="vllm")
        )

    def test_gguf_has_a_type_for_each(self, checkpoint, template, tmp_path):
        assert export(checkpoint, Gguf(template=str(template)), tmp_path / "out").logit_difference == 0
        types = {
            tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors
        }
        assert (types["blk.1.ffn_down.weight"], types["blk.1.ffn_up.weight"]) == ("Q4_0", "Q5_0")

    def test_mlx_has_an_entry_for_each(self, checkpoint, tmp_path):
        pytest.importorskip("mlx", reason="mlx is not installed")
        assert export(checkpoint, Mlx(), tmp_path / "out").logit_difference == 0
        assert config_of(tmp_path / "out")["quantization"][self.DOWN] == {"group_size": 64, "bits": 3, "mode": "affine"}


class TestPeft:
    @pytest.fixture(autouse=True)
    def _library(self):
        pytest.importorskip("peft", reason="peft is not installed")

    @pytest.mark.parametrize("element", ["mxfp4_e2m1", "mxfp6_e2m3", "mxfp8_e4m3"])
    def test_over_mx_floats_too_only_the_order_of_sums_differs(self, checkpoint_of, element, tmp_path):
        """In bfloat16, to which compressed-tensors unpacks them, that order would show in the third digit."""
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
        check = export(checkpoint_of(MX(element), method=LqerAct(), rank=4), Peft(), tmp_path / "out")
        assert (check.dtype, check.tokens_per_window) == ("float32", 64)
        assert check.logit_difference < 1e-5

    @pytest.fixture
    def factors(self, checkpoint_of):
        return checkpoint_of(MXInt(bits=3, block_size=32), method=LqerAct(), rank=4)

    @pytest.fixture
    def nf4(self, checkpoint_of):
        widths = {"hidden_size": 64, "intermediate_size": 128}
        return checkpoint_of(NormalFloat(bits=4), method=LoftQ(), rank=4, sizes=widths)

    def test_factors_are_an_adapter_over_packed_weights(self, factors, tmp_path):
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
        check = export(factors, Peft(), tmp_path / "out")
        assert check.logit_difference < 1e-5
        assert config_of(tmp_path / "out" / "base")["quantization_config"]["quant_method"] == "compressed-tensors"

    @torch.no_grad()
    def test_over_a_dense_base_factors_of_a_rotated_linear_are_turned_back(self, checkpoint_of, windows_WT, tmp_path):
        checkpoint = checkpoint_of(MXInt(bits=3), method=LqerAct(), rank=4, transform=Hadamard())
        assert "rotated basis" in refusal(checkpoint, Peft())
        check = export(checkpoint, Peft(base="dense"), tmp_path / "out")
        assert check.logit_difference < 1e-5
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
        assert (base(windows_WT).logits - load_quantized(checkpoint, CPU)(windows_WT).logits).abs().max() > 1e-2

    def test_over_nf4_the_factors_are_a_start_for_qlora(self, nf4, tmp_path):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        check = export(nf4, Peft(base="nf4"), tmp_path / "out")
        assert check.logit_difference < 1e-4
        quantization = config_of(tmp_path / "out" / "base")["quantization_config"]
        assert (quantization["quant_method"], quantization["bnb_4bit_quant_type"]) == ("bitsandbytes", "nf4")
        assert "is_trainable=True" in (tmp_path / "out" / "README.md").read_text()

    def test_bitsandbytes_makes_the_same_codes_and_scales_of_the_dequantized_weights(self, nf4):
        functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
        linears, _ = next(iter(Source(nf4).read()))
        for linear in linears:
            written = nf4_tensors(linear)
            codes, state = functional.quantize_4bit(linear.weight_OI.dequantize(), blocksize=64, quant_type="nf4")
            assert torch.equal(written["weight"], codes)
            assert torch.equal(written["weight.absmax"], state.absmax)
            torch.testing.assert_close(written["weight.quant_map"], state.code, rtol=0, atol=1e-6)

    def test_nf4_alone_is_taken(self, checkpoint_of, factors):
        assert "it is not in normal-float of 4 bits, blocks of 64" in refusal(factors, Peft(base="nf4"))

    def test_every_rank_has_a_scale_of_one(self):
        specs = {
            name: LinearSpec(name, MXInt(bits=4), 8, 8, rank) for name, rank in {"a": 4, "b": 2, "c": 4, "d": 0}.items()
        }
        config = adapter_config(specs)
        assert (config["r"], config["lora_alpha"]) == (4, 4)
        assert config["rank_pattern"] == config["alpha_pattern"] == {"b": 2}
        assert config["target_modules"] == ["a", "b", "c"]

    def test_a_checkpoint_without_factors_is_refused(self, checkpoint_of):
        assert "nor any other linear has low-rank factors" in refusal(checkpoint_of(INT8_ROW), Peft())


def refusal(checkpoint, target):
    found = first_unsupported(Source(checkpoint), target)
    assert found is not None
    return " ".join(found)


class TestRefusals:
    def test_low_rank_factors_and_rotations(self, checkpoint_of, tmp_path):
        checkpoint = checkpoint_of(MXInt(bits=4), method=LqerAct(), rank=4)
        rotated = checkpoint_of(MXInt(bits=4), transform=Hadamard())
        assert refusal(checkpoint, CompressedTensors()) == (
            "model.layers.0.self_attn.q_proj it has low-rank factors (rank 4)"
        )
        for target in (CompressedTensors(), Gguf()):
            assert "rounded in a rotated basis" in refusal(rotated, target)

    def test_one_line_names_the_first_linear_and_the_targets_that_would_do(self, checkpoint_of, tmp_path):
        with pytest.raises(ExportError) as error:
            export(checkpoint_of(NormalFloat(bits=4)), CompressedTensors(), tmp_path / "out")
        assert str(error.value) == (
            "compressed-tensors cannot hold model.layers.0.self_attn.q_proj: normal-float is not integers times a "
            "scale; targets that can: dense, native"
        )
        assert not (tmp_path / "out").exists()

    def test_levels_without_a_zero_are_refused(self, checkpoint_of):
        mid_rise = checkpoint_of(MXInt(bits=4, levels="mid-rise"))
        assert "mid-rise levels have no zero" in refusal(mid_rise, CompressedTensors())

    def test_rows_that_are_not_whole_groups_are_refused(self, checkpoint_of):
        assert "32 inputs are not whole groups of 12" in refusal(
            checkpoint_of(Int(bits=4, block_size=12)), CompressedTensors()
        )

    def test_zero_points_beside_another_layout_are_refused(self, checkpoint_of, edited):
        def other_width(details):
            described = details["linears"]["model.layers.1.mlp.down_proj"]["weight"]["format"]
            described["bits"] = 8

        mixed = edited(checkpoint_of(Int(bits=4, block_size=32)), "lqer.json", other_width)
        assert "zero points and others another layout" in refusal(mixed, CompressedTensors())

    def test_matrices_that_engines_fuse_must_have_one_layout(self, checkpoint_of, edited):
        def other_width(details):
            details["linears"]["model.layers.1.self_attn.v_proj"]["weight"]["format"]["bits"] = 8

        mixed = edited(checkpoint_of(MXInt(bits=4, block_size=32)), "lqer.json", other_width)
        assert "vLLM runs q_proj, k_proj, v_proj as one matrix" in refusal(mixed, CompressedTensors())

    def test_transposed_weights_are_refused(self, checkpoint_of):
        assert "Conv1D" in refusal(checkpoint_of(INT8_ROW, "gpt2"), CompressedTensors())


class TestGguf:
    @pytest.mark.parametrize(
        ("weight", "block_type"),
        [
            (MXInt(bits=4, block_size=32), "Q4_0"), (Int(bits=4, block_size=32), "Q5_0"), (INT8_ROW, "Q8_0"),
            (MX("mxfp4_e2m1"), "MXFP4"),
        ],
    )  # fmt: skip
    def test_transformers_reads_the_file_and_computes_the_same(
        self, checkpoint_of, weight, block_type, template, tmp_path
    ):
        check = export(checkpoint_of(weight), Gguf(template=str(template)), tmp_path / "out")
        assert check.logit_difference == 0
        reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
        types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        assert types["blk.1.ffn_up.weight"] == block_type
        assert types["blk.1.ffn_norm.weight"] == types["rope_freqs.weight"] == "F32"
        assert reader.fields["tokenizer.ggml.tokens"].contents()[3] == "t3"

    @pytest.mark.parametrize(("dtype", "stored"), [("float32", "F32"), ("bfloat16", "BF16")])
    def test_dequantized_weights_hold_factors_and_rotations(self, checkpoint_of, template, dtype, stored, tmp_path):
        checkpoint = checkpoint_of(NormalFloat(bits=4), method=LqerAct(), rank=4, transform=Hadamard())
        check = export(checkpoint, Gguf(template=str(template), dtype=dtype), tmp_path / "out")
        assert 0 < check.logit_difference < (1e-4 if dtype == "float32" else 0.1)
        types = {
            tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors
        }
        assert types["blk.1.ffn_up.weight"] == stored
        assert types["token_embd.weight"] == "F32"

    def test_factors_are_an_adapter_that_merges_to_the_checkpoint(self, checkpoint_of, template, tmp_path):
        checkpoint = checkpoint_of(MXInt(bits=3, block_size=32), method=LqerAct(), rank=4)
        check = export(checkpoint, Gguf(template=str(template)), tmp_path / "out")
        assert check.logit_difference < 1e-5
        adapter = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
        assert adapter.fields["adapter.lora.alpha"].contents() == 0
        shapes = {tensor.name: tensor.data.shape for tensor in adapter.tensors}
        assert shapes["blk.1.ffn_up.weight.lora_a"] == (4, 32)
        assert shapes["blk.1.ffn_up.weight.lora_b"] == (64, 4)
        assert "--lora out/adapter.gguf" in (tmp_path / "out" / "README.md").read_text()
        plain = checkpoint_of(MXInt(bits=3, block_size=32))
        export(plain, Gguf(template=str(template)), tmp_path / "plain")
        assert not (tmp_path / "plain" / "adapter.gguf").exists()

    def test_a_template_is_needed_and_checked(self, checkpoint_of, tmp_path):
        checkpoint = checkpoint_of(INT8_ROW)
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(b"GGUF and nothing else")
        for target, words in (
            (Gguf(), "needs a GGUF file of the original model: --template"),
            (Gguf(template=str(tmp_path / "absent.gguf")), "no such file"),
            (Gguf(template=str(broken)), "template"),
        ):
            with pytest.raises(ConfigError, match=words):
                export(checkpoint, target, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_template_of_another_model_is_refused(self, checkpoint_of, template, tmp_path):
        checkpoint = checkpoint_of(INT8_ROW, sizes={"num_hidden_layers": 3})
        with pytest.raises(ConfigError, match="of another model: its block_count is 2, the checkpoint's 3"):
            export(checkpoint, Gguf(template=str(template)), tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestMlx:
    @pytest.fixture(autouse=True)
    def _library(self):
        pytest.importorskip("mlx", reason="mlx is not installed")

    @pytest.mark.parametrize(
        "weight",
        [
            MXInt(bits=2, block_size=32), MXInt(bits=4, block_size=32), MXInt(bits=6, block_size=32),
            Int(bits=3, block_size=32), Int(bits=5, block_size=32), Int(bits=4, block_size="row"), INT8_ROW,
            MX("mxint8"), MX("mxfp4_e2m1"), MX("mxfp8_e4m3"),
        ],
        ids=str,
    )  # fmt: skip
    def test_mlx_decodes_the_checkpoints_weights(self, checkpoint_of, weight, tmp_path):
        check = export(checkpoint_of(weight), Mlx(), tmp_path / "out")
        assert check.logit_difference == 0

    def test_linears_of_other_bits_and_groups_are_named(self, checkpoint_of, edited):
        specs = {
            "a": LinearSpec("a", Int(bits=4, block_size=128), 8, 256),
            "b": LinearSpec("b", Int(bits=4, block_size=128), 8, 256),
            "c": LinearSpec("c", Int(bits=3, block_size=64, symmetric=True), 8, 128),
            "d": LinearSpec("d", MX("mxfp4_e2m1"), 8, 128),
        }
        assert quantization(specs) == {
            "group_size": 128, "bits": 4, "mode": "affine",
            "c": {"group_size": 64, "bits": 3, "mode": "affine"},
            "d": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        }  # fmt: skip

    def test_scales_in_half_precision_are_rounded_and_said(self, checkpoint_of, tmp_path):
        checkpoint = checkpoint_of(Int(bits=4, block_size=32))
        check = export(checkpoint, Mlx(scale_dtype="float16"), tmp_path / "out")
        assert check.logit_difference > 0
        stored = load_file(tmp_path / "out" / "model.safetensors")
        assert stored["model.layers.1.mlp.up_proj.biases"].dtype == torch.float16
        assert "rounded once more, to float16" in (tmp_path / "out" / "README.md").read_text()

    def test_widths_and_blocks_that_mlx_has_no_kernel_for(self, checkpoint_of):
        assert "7 bits are not one of" in refusal(checkpoint_of(Int(bits=7, block_size=32)), Mlx())
        assert "no group of 128, 64, 32 divides its 32 inputs and blocks of 16" in refusal(
            checkpoint_of(MXInt(bits=4)), Mlx()
        )
