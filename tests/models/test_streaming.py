"""A model read from disk block by block is the model that transformers loads whole."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import pytest
import torch
from helpers import all_sites, quantize, resident
from mixtures import MIXTURES, random_mixture
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lqer.checkpoint.load import load_quantized, open_verified
from lqer.checkpoint.pack import OUTSIDE_FILE
from lqer.checkpoint.verify import CheckpointFiles
from lqer.errors import ModelError
from lqer.evaluation.perplexity import concat_perplexity, window_nlls
from lqer.models.loaders import RESIDENT, OpenedModel, Streamed
from lqer.models.reading import read_file
from lqer.models.source import load_model, resolve_model
from lqer.models.streaming import open_model
from lqer.stages.calibrate import calibrate
from lqer.stages.gather import CalibrationText, stored_statistics
from lqer.stages.quantize_linears import QuantizeSettings
from lqer.store.names import block_file
from lqer.store.store import Store

CPU = torch.device("cpu")


@pytest.fixture
def saved(random_model, tmp_path):
    """`saved(architecture, **changes)`: the folder of a random model, as it came, before its Conv1D were replaced."""

    def save(architecture: str, dtype: torch.dtype = torch.float32, shards: str = "10GB", **changes) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(random_model(architecture, **changes).config).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "model", max_shard_size=shards)
        return tmp_path / "model"

    return save


def assert_same_tensors(streamed: nn.Module, whole: nn.Module) -> None:
    found = {**dict(streamed.named_parameters()), **dict(streamed.named_buffers())}
    expected = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_is(opened: OpenedModel, whole: PreTrainedModel) -> None:
    """Blocks, surroundings, ties and configuration are those of the model loaded whole."""
    blocks = whole.get_submodule(opened.name)
    for index, block in opened.loader.load_each(opened.blocks, range(len(opened.blocks)), CPU):
        assert_same_tensors(block, blocks[index])
    opened.loader.load_outer()
    outside = [name for name, _ in whole.named_parameters() if not name.startswith(f"{opened.name}.")]
    for name in outside:
        assert torch.equal(opened.model.get_parameter(name), whole.get_parameter(name)), name
    heads = [model.get_output_embeddings().weight for model in (opened.model, whole)]
    embeddings = [model.get_input_embeddings().weight for model in (opened.model, whole)]
    assert (heads[0] is embeddings[0]) == (heads[1] is embeddings[1])
    assert opened.model.config.to_dict() == whole.config.to_dict()
    assert opened.model.generation_config.to_dict() == whole.generation_config.to_dict()
    assert opened.model.dtype == whole.dtype


def was_streamed(opened: OpenedModel) -> bool:
    return isinstance(opened.loader, Streamed)


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_every_family_is_read_block_by_block_as_it_is_loaded_whole(architecture, saved, dtype):
    source = resolve_model(str(saved(architecture, torch.bfloat16)))
    opened = open_model(source, dtype, CPU)
    assert was_streamed(opened)
    assert_is(opened, load_model(source, dtype, CPU))


def test_shards_are_read_as_one_file_is(saved):
    folder = saved("llama", shards="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    source = resolve_model(str(folder))
    opened = open_model(source, torch.float32, CPU)
    assert was_streamed(opened)
    assert_is(opened, load_model(source, torch.float32, CPU))


@pytest.mark.parametrize("tied", ["once", "twice", "apart"])
def test_tied_weights_are_tied_where_transformers_ties_them(saved, tied):
    folder = saved("llama", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    if tied != "once":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (-1 if tied == "apart" else 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = resolve_model(str(folder))
    assert_is(open_model(source, torch.float32, CPU), load_model(source, torch.float32, CPU))


def test_a_checkpoint_of_the_base_model_alone_is_read(saved):
    folder = saved("gpt2")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    source = resolve_model(str(folder))
    opened = open_model(source, torch.float32, CPU)
    assert was_streamed(opened)
    assert_is(opened, load_model(source, torch.float32, CPU))


def test_without_a_dtype_in_its_config_a_model_has_that_of_its_first_tensor(saved):
    folder = saved("llama", torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    source = resolve_model(str(folder))
    opened = open_model(source, "auto", CPU)
    assert opened.model.dtype == torch.bfloat16
    assert_is(opened, load_model(source, "auto", CPU))


class TestWhatIsLoadedWhole:
    def opened(self, folder: Path, caplog) -> tuple[OpenedModel, str]:
        with caplog.at_level(logging.INFO, "lqer"):
            opened = open_model(resolve_model(str(folder)), torch.float32, CPU)
        assert opened.loader is RESIDENT
        return opened, caplog.text

    def test_a_checkpoint_is_whose_tensors_transformers_renames(self, saved, caplog, monkeypatch):
        monkeypatch.setattr(
            "lqer.models.stored.get_model_conversion_mapping", lambda *arguments, **options: ["a renaming"]
        )
        text = self.opened(saved("llama"), caplog)[1]
        assert "not block by block: transformers converts the tensors of LlamaForCausalLM" in text


def test_stages_on_a_streamed_model_write_the_bytes_of_those_on_a_whole_one(
    architecture, saved, plan, windows_WT, letter_tokenizer, tmp_path
):
    source = resolve_model(str(saved(architecture, torch.bfloat16)))
    artifacts = {}
    for kind in ("streamed", "whole"):
        store = Store(tmp_path / kind)

        def opened(dtype, kind=kind):
            if kind == "streamed":
                return open_model(source, dtype, CPU)
            return resident(load_model(source, dtype, CPU))

        def make_calibration(workspace, opened=opened):
            model = opened(torch.float32)
            calibrate(workspace, model, CalibrationText(windows_WT, 2, 24))

        calibration = store.obtain("calibrate", 0, make_calibration)

        def make_checkpoint(workspace, opened=opened, calibration=calibration):
            model = opened("auto")
            linears = list(all_sites(calibration))
            settings = QuantizeSettings(dict.fromkeys(linears, plan), None, seed=0)
            quantize(workspace, model, letter_tokenizer, stored_statistics(calibration), settings)

        artifacts[kind] = (calibration, store.obtain("quantize", 0, make_checkpoint))
    for streamed, whole in zip(artifacts["streamed"], artifacts["whole"], strict=True):
        assert streamed.manifest["files"] == whole.manifest["files"]


class TestBlockwisePerplexity:
    def test_of_the_original_is_that_of_the_whole_model_to_the_bit(self, architecture, saved, windows_WT):
        source = resolve_model(str(saved(architecture)))
        whole = load_model(source, torch.float32, CPU)
        opened = open_model(source, torch.float32, CPU)
        for blockwise_B, whole_B in zip(
            window_nlls(opened, windows_WT.split(2)), window_nlls(whole, windows_WT.split(2))
        ):
            assert torch.equal(blockwise_B, whole_B)

    def test_of_a_quantized_checkpoint_is_that_of_the_whole_one_to_the_bit(self, stages, windows_WT):
        path = stages.checkpoint.path
        whole = concat_perplexity(load_quantized(path, CPU), windows_WT, 2)
        assert concat_perplexity(open_verified(CheckpointFiles(path), CPU, None, "auto"), windows_WT, 2) == whole

    def test_of_a_checkpoint_with_quantized_attention_is_so_too(self, random_model, run_stages, plan, windows_WT):
        attention = {"format": plan.weight.to_dict(), "axis": "reduction"}
        path = run_stages(random_model("llama"), plan, attention=attention).checkpoint.path
        whole = concat_perplexity(load_quantized(path, CPU), windows_WT, 2)
        assert concat_perplexity(open_verified(CheckpointFiles(path), CPU, None, "auto"), windows_WT, 2) == whole

    def test_a_model_can_be_walked_again(self, stages, windows_WT):
        opened = open_verified(CheckpointFiles(stages.checkpoint.path), CPU, None, "auto")
        first = concat_perplexity(opened, windows_WT, 2)
        assert concat_perplexity(opened, windows_WT, 2) == first

    @pytest.mark.parametrize(("file", "missing"), [
        (OUTSIDE_FILE, "model.norm.weight"), (block_file(1), "model.layers.1.input_layernorm.weight")
    ])  # fmt: skip
    def test_a_tensor_that_is_missing_is_named(self, random_model, run_stages, plan, windows_WT, file, missing):
        path = run_stages(random_model("llama"), plan).checkpoint.path
        tensors = load_file(path / file)
        del tensors[missing]
        save_file(tensors, path / file)
        with pytest.raises(ModelError, match=f"has no values for {missing}"):
            concat_perplexity(open_verified(CheckpointFiles(path, False), CPU, None, "auto"), windows_WT, 2)


class TestReadingAhead:
    def test_blocks_read_ahead_are_the_same(self, saved, windows_WT):
        source = resolve_model(str(saved("llama", num_hidden_layers=5)))
        opened = open_model(source, torch.float32, CPU)
        expected = concat_perplexity(opened, windows_WT, 2)
        opened.loader.ahead = True
        assert concat_perplexity(opened, windows_WT, 2) == expected

    def test_one_block_is_read_while_the_one_before_is_used(self):
        blocks, wanted = nn.ModuleList(nn.Linear(2, 2) for _ in range(5)), [0, 2, 3, 4]
        was_read = [threading.Event() for _ in blocks]
        loader = Streamed(lambda i: was_read[i].set() or {}, lambda *arguments: None, lambda: None, ahead=True)
        for position, (index, _) in enumerate(loader.load_each(blocks, wanted, CPU)):
            assert index == wanted[position]
            assert all(was_read[following].wait(60) for following in wanted[position + 1 : position + 2])
            assert [i for i in wanted if was_read[i].is_set()] == wanted[: position + 2]

    def test_an_error_of_the_reader_reaches_the_caller(self):
        def read(index: int) -> dict[str, Tensor]:
            raise OSError("the disk is gone")

        loader = Streamed(read, lambda *arguments: None, lambda: None, ahead=True)
        with pytest.raises(OSError, match="the disk is gone"):
            next(loader.load_each(nn.ModuleList([nn.Linear(2, 2)]), [0], CPU))


def test_a_block_that_was_used_holds_no_memory(saved):
    opened = open_model(resolve_model(str(saved("llama"))), torch.float32, CPU)
    kept = [block for _, block in opened.loader.load_each(opened.blocks, [0, 1], CPU)]
    assert all(parameter.numel() == 0 for block in kept for parameter in block.parameters())
    assert all(parameter.is_meta for parameter in opened.blocks.parameters())


def test_tensors_in_page_locked_memory_are_those_of_the_file(saved, monkeypatch):
    """Several threads fill such memory; there is none without a GPU, so that other memory stands for it."""
    file = next(saved("llama").glob("*.safetensors"))
    locked: list[Tensor] = []
    empty = torch.empty

    def lockable(*args, pin_memory=False, **options):
        tensor = empty(*args, **options)
        if pin_memory:
            locked.append(tensor)
        return tensor

    monkeypatch.setattr(torch, "empty", lockable)
    found, expected = read_file(file, pinned=True), load_file(file)
    assert [*found] == [*read_file(file)]
    assert len(locked) == len(expected) > 4
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_are_read_block_by_block_as_they_are_loaded_whole(kind, dtype, tmp_path):
    """As transformers saves them: stacked for some kinds, under names of their own for others."""
    random_mixture(kind).to(dtype).save_pretrained(tmp_path, max_shard_size="40KB")
    source = resolve_model(str(tmp_path))
    opened = open_model(source, "auto", CPU)
    assert isinstance(opened.loader, Streamed)
    assert_is(opened, load_model(source, "auto", CPU))
