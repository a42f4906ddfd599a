"""Experts that are split into linears: against the model's own code, and from weights to a loaded checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import resident
from mixtures import MIXTURES, random_mixture
from torch import nn

from lqer.checkpoint.load import load_quantized
from lqer.models.source import load_model, resolve_model
from lqer.models.structure import block_linears, find_blocks, prepare_model
from lqer.models.walker import walk_to_logits
from lqer.nn.experts import count, experts_of, routes

CPU = torch.device("cpu")
TRANSPOSED = ("gpt_oss", "llama4_text")
# Products, or what is passed on, are summed in another order.
REORDERED = (*TRANSPOSED, "longcat_flash", "deepseek_v4", "hy_v4")
# Of hyper-connections, of an indexer, and of what compresses keys and values.
BESIDE_EXPERTS = (
    "_hc.fn", "indexer.weights_proj.weight", "scorer.weights_proj.weight", "position_bias",
    *(f"{part}.{name}_proj.weight" for part in ("compressor", "indexer") for name in ("kv", "gate")),
)  # fmt: skip


@pytest.fixture(scope="module", params=MIXTURES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def original(kind):
    return random_mixture(kind)


@pytest.fixture(scope="module")
def split(original):
    model = copy.deepcopy(original)
    prepare_model(model)
    return model


@torch.no_grad()
def test_a_split_model_computes_what_the_model_computes(kind, original, split, windows_WT):
    assert original.config._experts_implementation == "eager"
    expected, found = original(windows_WT).logits, split(windows_WT).logits
    if kind in REORDERED:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, expected)


def test_every_weight_of_an_expert_is_a_linears(original, split):
    _, blocks = find_blocks(split)
    # Of experts that pass their tokens on, transformers holds weights that nothing reads.
    stacks = [p for name, p in original.named_parameters() if name.endswith("experts.gate_up_proj")]
    unread = sum(stack[4:].numel() for stack in stacks)
    assert sum(p.numel() for p in split.parameters()) + unread == sum(p.numel() for p in original.parameters())
    assert any(experts_of(block) for block in blocks)
    for block in blocks:
        linears = {id(linear.weight) for linear in block_linears(block).values()}
        matrices = [name for name, p in block.named_parameters() if p.ndim > 1 and id(p) not in linears]
        kept = [name for name in matrices if not name.endswith(BESIDE_EXPERTS)]
        # Routers, gates of shared experts.
        assert all(block.get_parameter(name).shape[0] in (1, len(stacks[0])) for name in kept), kept


@torch.no_grad()
def test_a_split_model_is_walked_block_by_block(split, windows_WT):
    logits = walk_to_logits(resident(split), windows_WT.split(2), lambda runs: runs)
    assert torch.equal(logits(0), split(windows_WT[:2]).logits)


@torch.no_grad()
def test_a_checkpoint_computes_what_plain_transformers_computes_with_its_weights(
    original, split, run_stages, plan, windows_WT
):
    checkpoint = run_stages(split, plan).checkpoint
    loaded = load_quantized(checkpoint.path, CPU)
    expected = copy.deepcopy(original)
    put_into(expected, loaded)
    torch.testing.assert_close(loaded(windows_WT).logits, expected(windows_WT).logits, rtol=1e-4, atol=1e-5)
    assert (loaded(windows_WT).logits - original(windows_WT).logits).abs().max() > 1e-3


@torch.no_grad()
def test_a_checkpoint_generates_the_same_with_a_cache_and_without(split, run_stages, plan, windows_WT):
    loaded = load_quantized(run_stages(split, plan).checkpoint.path, CPU)
    texts = [
        loaded.generate(windows_WT[:2], max_new_tokens=8, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*texts)


@torch.no_grad()
def test_a_saved_model_is_loaded_split(original, split, windows_WT, tmp_path):
    original.save_pretrained(tmp_path)
    loaded = load_model(resolve_model(str(tmp_path)), torch.float32, CPU)
    assert torch.equal(loaded(windows_WT).logits, split(windows_WT).logits)


@torch.no_grad()
def test_a_router_stays_in_float32_where_transformers_keeps_it_there(original, split, run_stages, plan, tmp_path):
    original.save_pretrained(tmp_path)
    own = load_model(resolve_model(str(tmp_path)), torch.bfloat16, CPU)
    loaded = load_quantized(run_stages(split, plan).checkpoint.path, CPU, torch.bfloat16)
    for name, tensor in [*loaded.named_parameters(), *loaded.named_buffers()]:
        if not name.endswith(("low_rank_a", "low_rank_b", "signs")):
            owner, _, leaf = name.rpartition(".")
            assert tensor.dtype == getattr(own.get_submodule(owner), leaf).dtype, name


def put_into(model: nn.Module, loaded: nn.Module) -> None:
    """Write the effective weights of a loaded checkpoint into a model that transformers built."""
    for name, module in loaded.named_modules():
        if not hasattr(module, "low_rank_a"):
            continue
        weight_OI = module.weight + (module.low_rank_a @ module.low_rank_b).T
        owner, _, group = name.rpartition(".")
        if group.isdigit():
            model.get_submodule(owner).weight.chunk(model.config.o_groups)[int(group)].copy_(weight_OI)
            continue
        before, _, rest = name.partition(".experts.")
        index, _, leaf = rest.partition(".")
        if not index.isdigit():
            model.get_submodule(name).weight.copy_(weight_OI)
            continue
        experts = model.get_submodule(f"{before}.experts")
        stacked = experts.down_proj if leaf == "down_proj" else experts.gate_up_proj
        is_transposed = model.config.model_type in TRANSPOSED
        rows_OI = stacked[int(index)].T if is_transposed else stacked[int(index)]
        if leaf != "down_proj":
            part = ("gate_proj", "up_proj").index(leaf)
            rows_OI = rows_OI[part::2] if model.config.model_type == "gpt_oss" else rows_OI.chunk(2)[part]
        rows_OI.copy_(weight_OI)


def test_tokens_go_to_their_experts_in_order_and_to_none_where_the_index_is_outside():
    top_k_index = torch.tensor([[2, 0], [0, 3], [2, 4]])
    found = [(index, tokens.tolist(), places.tolist()) for index, tokens, places in routes(top_k_index, 3)]
    assert found == [(0, [0, 1], [1, 0]), (2, [0, 2], [0, 0])]


def test_experts_are_counted_without_what_stands_beside_them(split):
    experts = next(iter(experts_of(find_blocks(split)[1][-1]).values()))
    assert count(experts) == 4
