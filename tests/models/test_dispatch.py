"""A model spread over several devices is the model on one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lqer.checkpoint.load import load_quantized, open_verified
from lqer.checkpoint.verify import CheckpointFiles
from lqer.errors import ModelError
from lqer.evaluation.perplexity import concat_perplexity
from lqer.formats import MXInt
from lqer.models.dispatch import device_of, dispatch, dispatch_all, with_tied_head
from lqer.models.source import load_model, resolve_model
from lqer.models.streaming import open_model

CPU = torch.device("cpu")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
BLOCKS = 4


@pytest.fixture(scope="module")
def original(random_model, tmp_path_factory):
    """The folder of a random model of four blocks whose output layer shares the input's weights."""
    folder = tmp_path_factory.mktemp("dispatch") / "model"
    model = random_model("llama", num_hidden_layers=BLOCKS, tie_word_embeddings=True)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(random_model, run_stages, plan):
    """What `quantize` makes of it: 4-bit weights, 8-bit inputs and factors."""
    model = random_model("llama", num_hidden_layers=BLOCKS, tie_word_embeddings=True)
    rounded = replace(plan, weight=MXInt(bits=4), activation=MXInt(bits=8))
    return run_stages(model, rounded).checkpoint.path


def halves(last: int | str, first: int | str) -> dict[str, int | str]:
    """Blocks and embedding in two halves; what comes after the blocks is with the later one."""
    blocks = {f"model.layers.{index}": first if index < BLOCKS // 2 else last for index in range(BLOCKS)}
    return {"model.embed_tokens": first, "model.rotary_emb": first, **blocks, "model.norm": last, "lm_head": last}


@torch.no_grad()
def logits(model: PreTrainedModel, windows_WT: Tensor) -> Tensor:
    return model(windows_WT.to(model.device), use_cache=False).logits.float().cpu()


def test_the_entry_of_a_module_is_that_of_the_nearest_one_around_it():
    device_map = {"model.layers.1": "cuda:1", "model": "cuda:2", "model.layers.11": "cuda:3", "lm_head": "cuda:4"}
    assert device_of("model.layers.1", device_map) == "cuda:1"
    assert device_of("model.layers.11", device_map) == "cuda:3"
    assert device_of("model.layers.12", device_map) == "cuda:2"
    assert device_of("model.layers.12", {"": "cpu"}) == "cpu"


def test_an_output_layer_with_the_weight_of_the_embedding_lies_where_that_does(original, random_model):
    opened = open_model(resolve_model(str(original)), torch.float32, CPU)
    opened.loader.load_outer()
    device_map = halves(first="cuda:0", last="cuda:1")
    assert with_tied_head(opened.model, device_map) == device_map | {"lm_head": "cuda:0"}
    untied = random_model("llama", num_hidden_layers=BLOCKS, tie_word_embeddings=False)
    assert with_tied_head(untied, device_map) == device_map


def test_all_of_it_on_one_device_is_the_model(original, checkpoint, windows_WT):
    source = resolve_model(str(original))
    expected = logits(load_model(source, torch.float32, CPU), windows_WT)
    assert torch.equal(logits(dispatch(open_model(source, torch.float32, CPU), {"": "cpu"}), windows_WT), expected)
    expected = logits(load_quantized(checkpoint, CPU), windows_WT)
    placed = dispatch(open_verified(CheckpointFiles(checkpoint), CPU, torch.float32, "emulate"), {"": "cpu"})
    assert torch.equal(logits(placed, windows_WT), expected)


def test_gpus_that_do_not_hold_the_model_are_refused(original, monkeypatch):
    monkeypatch.setattr("lqer.models.dispatch.get_balanced_memory", lambda model, **options: {"cpu": 2**40})
    with pytest.raises(ModelError, match=r"LlamaForCausalLM does not fit .* evaluation\.blockwise = true"):
        dispatch_all(open_model(resolve_model(str(original)), torch.float32, CPU))


@needs_two_gpus
class TestTwoGpus:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_original_computes_the_same_in_halves(self, original, windows_WT, dtype):
        source = resolve_model(str(original))
        expected = logits(load_model(source, dtype, torch.device("cuda", 0)), windows_WT)
        model = dispatch(open_model(source, dtype, CPU), halves(first=0, last=1))
        assert {parameter.device.index for parameter in model.parameters()} == {0, 1}
        assert torch.equal(logits(model, windows_WT), expected)

    @pytest.mark.parametrize(
        ("backend", "dtype"), [("emulate", torch.float32), ("emulate", torch.bfloat16), ("triton", torch.bfloat16)]
    )
    def test_a_checkpoint_computes_the_same_in_halves(self, checkpoint, windows_WT, backend, dtype):
        one = torch.device("cuda", 0)
        expected = logits(load_quantized(checkpoint, one, dtype, backend), windows_WT)
        model = dispatch(open_verified(CheckpointFiles(checkpoint), one, dtype, backend), halves(first=0, last=1))
        for layer, home in ((0, 0), (-1, 1)):
            block = model.model.layers[layer]
            assert {tensor.device.index for tensor in (*block.parameters(), *block.buffers())} == {home}
        assert torch.equal(logits(model, windows_WT), expected)
        assert torch.cuda.current_device() == 0

    def test_the_second_gpu_may_come_first(self, checkpoint, windows_WT):
        one = torch.device("cuda", 0)
        expected = logits(load_quantized(checkpoint, one, torch.bfloat16, "triton"), windows_WT)
        model = dispatch(
            open_verified(CheckpointFiles(checkpoint), one, torch.bfloat16, "triton"), halves(first=1, last=0)
        )
        assert torch.equal(logits(model, windows_WT), expected)

    def test_spread_uses_both_and_gives_the_same_perplexity(self, original, checkpoint, windows_WT):
        one = torch.device("cuda", 0)
        source = resolve_model(str(original))
        pairs = [
            (load_model(source, torch.float32, one), dispatch_all(open_model(source, torch.float32, CPU))),
            (
                load_quantized(checkpoint, one, torch.float32, "emulate"),
                dispatch_all(open_verified(CheckpointFiles(checkpoint), one, torch.float32, "emulate")),
            ),
        ]
        for single, both in pairs:
            assert {str(device) for device in both.hf_device_map.values()} == {"0", "1"}
            assert concat_perplexity(both, windows_WT, 2) == concat_perplexity(single, windows_WT, 2)
