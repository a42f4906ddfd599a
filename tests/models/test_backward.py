"""Gradients block by block, against one backward pass of the whole model.

Shapes: T tokens of the whole text, I in_features, O out_features, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import pytest
import torch
from helpers import build_gemma4, resident
from mixtures import random_mixture

from lqer.errors import ModelError
from lqer.models.backward import walk_backward
from lqer.models.source import resolve_model
from lqer.models.streaming import open_model
from lqer.models.structure import block_linears, find_blocks, prepare_model
from lqer.store.offload import Offload

CPU = torch.device("cpu")


def block_by_block(opened, windows_WT):
    """Inputs (W, T, I) and gradients (W, T, O) of every linear, by full name."""
    found = defaultdict(list)
    for run in walk_backward(opened, windows_WT, 2, seed=5):
        names = [f"{run.run.name}.{name}" for name in block_linears(run.run.block)]
        visits = {
            name.removeprefix(f"{run.run.name}."): partial(lambda into, x, g: into.append((x, g)), found[name])
            for name in names
        }
        run.backward(visits)
    return {name: tuple(map(torch.cat, zip(*pairs, strict=True))) for name, pairs in found.items()}


def in_one_pass(model, windows_WT):
    found, calls = defaultdict(list), {}
    name, blocks = find_blocks(model)
    hooks = [
        linear.register_forward_hook(partial(lambda key, _, args, y: calls.__setitem__(key, (args[0], y)), key))
        for i, block in enumerate(blocks)
        for key, linear in ((f"{name}.{i}.{one}", linear) for one, linear in block_linears(block).items())
    ]
    for batch, ids_BT in enumerate(windows_WT.split(2)):
        log_p_TV = model(ids_BT, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
        generator = torch.Generator().manual_seed(5 + batch)
        drawn_T1 = torch.multinomial(log_p_TV.detach().exp(), 1, generator=generator)
        # Not those of an indexer, nor of experts, which see a part of the tokens.
        differentiable = {key: call for key, call in calls.items() if call[1].requires_grad and ".experts." not in key}
        outputs = [y for _, y in differentiable.values()]
        gradients = torch.autograd.grad(-log_p_TV.gather(1, drawn_T1).sum(), outputs)
        for (key, (x, _)), gradient in zip(differentiable.items(), gradients, strict=True):
            found[key].append((x.detach().view(*ids_BT.shape, -1), gradient.reshape(*ids_BT.shape, -1)))
    for hook in hooks:
        hook.remove()
    return {name: tuple(map(torch.cat, zip(*pairs, strict=True))) for name, pairs in found.items()}


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_gradients_of_every_linear_are_those_of_the_whole_model(random_model, windows_WT, family):
    model = random_model(family, num_hidden_layers=3).float()
    expected, found = in_one_pass(model, windows_WT), block_by_block(resident(model), windows_WT)
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        for ours, theirs in zip(found[name], pair, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


def test_gradients_pass_blocks_that_attend_to_tokens_which_another_has_chosen(windows_WT):
    model = random_mixture("hy_v4")
    prepare_model(model)
    expected, found = in_one_pass(model, windows_WT[:2]), block_by_block(resident(model), windows_WT[:2])
    attention = [name for name in expected if "self_attn" in name]
    assert len(attention) == 3 * 6
    for name in attention:
        for ours, theirs in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


def test_a_model_whose_blocks_share_keys_and_values_is_refused(windows_WT):
    with pytest.raises(ModelError, match="its decoder blocks leave values for later ones, through which no gradients"):
        block_by_block(resident(build_gemma4(shared=3)), windows_WT)


def test_a_model_that_is_read_block_by_block_has_the_same_gradients(
    random_model, letter_tokenizer, windows_WT, tmp_path
):
    model = random_model("llama", num_hidden_layers=3)
    model.save_pretrained(tmp_path / "model")
    letter_tokenizer.save_pretrained(tmp_path / "model")
    opened = open_model(resolve_model(str(tmp_path / "model")), torch.float32, CPU, Offload(None, tmp_path))
    streamed, whole = block_by_block(opened, windows_WT), block_by_block(resident(model), windows_WT)
    for name, pair in whole.items():
        for ours, theirs in zip(streamed[name], pair, strict=True):
            assert torch.equal(ours, theirs)


def test_experts_see_a_part_of_the_tokens_and_other_linears_whole_windows(windows_WT):
    model, shapes = random_mixture("mixtral", num_hidden_layers=1), {}
    prepare_model(model)
    opened = resident(model)
    (run,) = walk_backward(opened, windows_WT[:4], 4, seed=5)
    visits = {
        name: partial(lambda key, x, g: shapes.setdefault(key, (x.shape[:2], g.shape[:2])), name)
        for name in block_linears(run.run.block)
    }
    run.backward(visits)
    of_experts = {name: shape for name, shape in shapes.items() if ".experts." in name}
    assert {shape for name, shape in shapes.items() if name not in of_experts} == {(windows_WT[:4].shape,) * 2}
    assert of_experts
    for x, g in of_experts.values():
        assert x == g
        assert x[0] == 1
        assert x[1] < windows_WT[:4].numel()
