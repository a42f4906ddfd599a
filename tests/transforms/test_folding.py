from __future__ import annotations

import copy

import pytest
import torch
from helpers import first_block
from torch import Tensor
from torch.utils._pytree import tree_map

from lqer.transforms.block_function import BlockFunction
from lqer.transforms.folding import NO_ROW, Fold, Site, find_sites, fold_scale, tied

# What feeds each site, by the ends of the names; None: nothing can take the scale.
SOURCES = {
    "llama": ["input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"],
    "mistral": ["input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"],
    "qwen3": ["input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"],
    "gemma3": ["input_layernorm", "v_proj", "pre_feedforward_layernorm", "up_proj"],
    # The norm of a linear attention has one weight for all heads.
    "qwen3.5": ["input_layernorm", None, "post_attention_layernorm", "up_proj"],
    "phi3": ["input_layernorm", "qkv_proj", "post_attention_layernorm", "gate_up_proj"],
    "opt": ["self_attn_layer_norm", "v_proj", "final_layer_norm", "fc1"],
    # The norms come after the branches and their outputs go on as the residual stream.
    "opt-350m": [None, "v_proj", None, "fc1"],
    # A GELU is not homogeneous.
    "gpt-neox": ["input_layernorm", "query_key_value", "post_attention_layernorm", None],
    "gpt2": ["ln_1", "c_attn", "ln_2", None],
}


@pytest.fixture(scope="module")
def case(architecture, random_model, windows_WT):
    return first_block(random_model(architecture), windows_WT)


def test_the_source_of_every_site_is_found(case, architecture):
    _, call, hidden = case
    found = [site.fold and site.fold.source.rpartition(".")[2] for site in find_sites(call, hidden)]
    assert found == SOURCES[architecture]


def test_the_function_stays_the_same_under_any_scale(case):
    block, call, hidden = case
    sites = find_sites(call, hidden)
    changed = dict(block.named_parameters())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for site in sites:
            if site.fold is not None:
                scale_O = torch.rand(len(changed[f"{site.fold.source}.weight"]), generator=generator) * 4 + 0.1
                changed |= fold_scale(changed, site, scale_O[site.fold.rows_I])
        original, scaled = call({}, hidden), call(changed, hidden)
    moved = [name for name, tensor in block.named_parameters() if not torch.allclose(tensor, changed[name], rtol=0.05)]
    assert len(moved) >= sum(len(site.linears) for site in sites if site.fold)
    torch.testing.assert_close(scaled, original, rtol=1e-4, atol=1e-4)


def test_grouped_queries_share_the_rows_of_v(random_model, windows_WT):
    sites = find_sites(*first_block(random_model("llama"), windows_WT)[1:])
    rows_I = next(site.fold.rows_I for site in sites if site.linears == ("self_attn.o_proj",))
    head = torch.arange(8)
    assert rows_I.tolist() == torch.cat([head, head, head + 8, head + 8]).tolist()


def test_of_fused_projections_only_the_rows_of_v_and_up_are_scaled(random_model, windows_WT):
    model = random_model("phi3", num_key_value_heads=4)
    folds = {site.linears[0]: site.fold for site in find_sites(*first_block(model, windows_WT)[1:])}
    assert folds["self_attn.o_proj"].rows_I.tolist() == list(range(64, 96))
    assert folds["mlp.down_proj"].rows_I.tolist() == list(range(64, 128))


def test_a_gain_that_is_added_to_one_is_recognized(random_model, windows_WT):
    sites = find_sites(*first_block(random_model("gemma3"), windows_WT)[1:])
    assert [site.fold.offset for site in sites] == [1.0, 0.0, 1.0, 0.0]


def test_a_channel_that_is_always_zero_is_not_scaled(random_model, windows_WT):
    model = random_model("opt")
    block, call, hidden = first_block(model, windows_WT)
    with torch.no_grad():
        block.fc1.bias[5] = -1e4
    sites = find_sites(call, hidden)
    rows_I = sites[-1].fold.rows_I
    assert rows_I[5] == NO_ROW
    assert rows_I.tolist() == [NO_ROW if i == 5 else i for i in range(64)]
    changed = fold_scale(dict(block.named_parameters()), sites[-1], torch.full((64,), 2.0))
    assert torch.equal(changed["fc1.weight"][5], block.fc1.weight[5])
    assert torch.equal(changed["fc2.weight"][:, 5], block.fc2.weight[:, 5])


def test_different_scales_for_one_row_are_refused(random_model, windows_WT):
    block, call, hidden = first_block(random_model("llama"), windows_WT)
    site = find_sites(call, hidden)[1]
    with pytest.raises(ValueError, match=r"the scale of self_attn.o_proj differs between channels that share a row"):
        fold_scale(dict(block.named_parameters()), site, torch.arange(1.0, 33.0))


def test_a_site_without_a_fold_cannot_be_scaled():
    with pytest.raises(ValueError, match="no norm or linear of the block can absorb the inverse scale of fc2"):
        fold_scale({}, Site(("fc2",), None), torch.ones(4))


def test_dtypes_are_kept():
    parameters = {"down.weight": torch.ones(2, 3, dtype=torch.bfloat16), "up.weight": torch.ones(3, 4).half()}
    site = Site(("down",), Fold("up", torch.arange(3)))
    changed = fold_scale(parameters, site, torch.tensor([1.0, 2.0, 4.0]))
    assert changed["down.weight"].dtype == torch.bfloat16
    assert changed["up.weight"].tolist() == [[1.0] * 4, [0.5] * 4, [0.25] * 4]


def test_in_half_precision_rows_are_at_most_doubled_and_the_same_are_found(random_model, windows_WT):
    block, call, hidden = first_block(random_model("llama"), windows_WT)
    expected = find_sites(call, hidden)
    kwargs = tree_map(lambda x: x.half() if isinstance(x, Tensor) and x.is_floating_point() else x, call.kwargs)
    # A factor of four would overflow.
    half = copy.deepcopy(block).half()
    with torch.no_grad():
        half.self_attn.v_proj.weight *= 1e4 / half.self_attn.v_proj(half.input_layernorm(hidden.half())).abs().max()
    sites = find_sites(BlockFunction(half, call.args, kwargs), hidden)
    for site, other in zip(sites, expected, strict=True):
        assert site.fold.source == other.fold.source
        assert torch.equal(site.fold.rows_I, other.fold.rows_I)


def test_channels_of_one_row_share_their_mean():
    rows_I = torch.tensor([1, 0, 1, NO_ROW])
    assert tied(torch.tensor([1.0, 5.0, 3.0, 0.0]), rows_I).tolist() == [2.0, 5.0, 2.0, 3.0]
