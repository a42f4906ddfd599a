"""Stage "token_weights": mean squared gradients, against one backward pass of the whole model.

Shapes: W windows, T tokens of a window, B windows of a batch, O out_features, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import resident
from killing import KilledError, dying_workspace
from mixtures import random_mixture
from tqdm import tqdm

from lqer.errors import ModelError
from lqer.models.structure import block_linears, find_blocks, prepare_model
from lqer.stages import weigh_tokens as stage
from lqer.stages.rotate import rotate_in_place
from lqer.stages.weigh_tokens import (
    PASS_BYTES,
    WeighTokens,
    batches_of_a_pass,
    effective_tokens,
    mean_squares,
    relative,
    weigh_tokens,
)
from lqer.store.names import token_weights_file
from lqer.store.offload import Offload
from lqer.store.workspace import Workspace

SEED, BATCH_SIZE = 5, 2
# Of five windows.
BATCHES = 3
SITES = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


def weighed(model, windows_WT, folder, at_once=BATCHES, make=Workspace):
    """The weights of every site (W, T), the site of every linear, and the bytes of all files."""
    workspace = make(folder)
    weigh_tokens(workspace, resident(model), windows_WT, BATCH_SIZE, SEED, at_once)
    batches = [workspace.tensors(token_weights_file(batch)) for batch in range(BATCHES)]
    weights = {site: torch.cat([batch[site] for batch in batches]) for site in batches[0]}
    return weights, workspace.json("sites.json"), {name: (folder / name).read_bytes() for name in workspace.names()}


def gradients_in_one_pass(model, windows_WT):
    """∂L/∂y (W, T, O) of every linear of the blocks by full name, from a pass of the whole model for each batch."""
    found, outputs = {}, {}
    name, blocks = find_blocks(model)
    linears = {f"{name}.{i}.{one}": x for i, block in enumerate(blocks) for one, x in block_linears(block).items()}
    hooks = [
        linear.register_forward_hook(lambda _, args, y, name=name: outputs.__setitem__(name, y))
        for name, linear in linears.items()
    ]
    for batch, ids_BT in enumerate(windows_WT.split(BATCH_SIZE)):
        log_p_TV = model(ids_BT, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
        drawn_T1 = torch.multinomial(log_p_TV.detach().exp(), 1, generator=torch.Generator().manual_seed(SEED + batch))
        gradients = torch.autograd.grad(-log_p_TV.gather(1, drawn_T1).sum(), [outputs[name] for name in linears])
        for name, gradient_BTO in zip(linears, gradients, strict=True):
            found.setdefault(name, []).append(gradient_BTO)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def test_a_token_weighs_its_mean_squared_gradient_over_all_outputs_of_a_site(random_model, windows_WT, tmp_path):
    model = random_model("llama", num_hidden_layers=3).float()
    gradients = gradients_in_one_pass(model, windows_WT)
    weights, sites, _ = weighed(model, windows_WT, tmp_path)
    assert sites.keys() == gradients.keys()
    for index in range(3):
        for kinds in SITES:
            names = [name for name in gradients if name.startswith(f"model.layers.{index}.") and name.endswith(kinds)]
            assert len(names) == len(kinds)
            assert {sites[name] for name in names} == {names[0]}
            expected_WT = torch.cat([gradients[name] for name in names], -1).square().mean(-1)
            torch.testing.assert_close(weights.pop(names[0]), expected_WT, rtol=1e-4, atol=1e-6 * expected_WT.max())
    assert not weights


def test_the_mean_is_over_the_outputs_of_all_linears():
    generator = torch.Generator().manual_seed(0)
    wide_BTO, narrow_BTO = torch.randn(2, 3, 8, generator=generator), torch.randn(2, 3, 2, generator=generator)
    found_BT = mean_squares([wide_BTO.square().sum(-1), narrow_BTO.square().sum(-1)], 10)
    torch.testing.assert_close(found_BT, torch.cat([wide_BTO, narrow_BTO], -1).square().mean(-1))


def test_weights_are_relative_to_their_mean_and_equal_where_there_are_none():
    torch.testing.assert_close(relative(torch.tensor([[1.0, 3.0], [4.0, 0.0]])), torch.tensor([[0.5, 1.5], [2.0, 0.0]]))
    assert torch.equal(relative(torch.zeros(2, 3)), torch.ones(2, 3))


def test_equal_weights_are_worth_all_tokens_and_uneven_ones_fewer():
    assert effective_tokens(torch.full((3, 4), 0.2)) == pytest.approx(12)
    assert effective_tokens(torch.tensor([[1.0, 0.0], [0.0, 0.0]])) == 1
    assert effective_tokens(torch.tensor([[3.0, 1.0]])) == pytest.approx(1.6)
    assert effective_tokens(torch.zeros(1, 2)) == 0


def test_the_log_names_the_site_whose_weights_are_worth_the_fewest_tokens(random_model, windows_WT, tmp_path):
    weights, *_ = weighed(random_model("llama"), windows_WT, tmp_path)
    settings = (BATCH_SIZE, SEED, torch.float32, torch.device("cpu"), Offload(), BATCHES)
    told = WeighTokens(None, windows_WT, *settings).summary(Workspace(tmp_path))
    worth = {site: effective_tokens(one) for site, one in weights.items()}
    fewest = min(worth, key=worth.get)
    assert told == (
        f"weights worth {worth[fewest]:.0f} ({fewest}) to {max(worth.values()):.0f} equally weighted tokens of "
        f"{windows_WT.numel()}"
    )
    assert 0 < worth[fewest] < max(worth.values()) < windows_WT.numel()


def test_a_rotated_model_has_the_weights_of_the_original(random_model, windows_WT, tmp_path):
    model, rotated = random_model("llama").float(), random_model("llama").float()
    rotate_in_place(rotated, torch.device("cpu"), seed=0)
    expected, found = (weighed(one, windows_WT, tmp_path / f"{id(one)}")[0] for one in (model, rotated))
    assert found.keys() == expected.keys()
    for site, weights_WT in expected.items():
        torch.testing.assert_close(found[site], weights_WT, rtol=1e-2, atol=1e-4 * weights_WT.max())


@pytest.mark.parametrize("at_once", [1, 2])
def test_windows_have_the_same_weights_in_any_pass(random_model, windows_WT, tmp_path, at_once):
    model = random_model("llama")
    *_, in_passes = weighed(model, windows_WT, tmp_path / "passes", at_once)
    assert in_passes == weighed(model, windows_WT, tmp_path / "one")[2]


@pytest.mark.parametrize("killed_at", ["sites.json", token_weights_file(0), token_weights_file(2)])
def test_a_killed_pass_resumes_with_the_same_bytes(random_model, windows_WT, tmp_path, killed_at):
    model = random_model("llama")
    with pytest.raises(KilledError):
        weighed(model, windows_WT, tmp_path / "killed", 2, dying_workspace(killed_at))
    *_, resumed = weighed(model, windows_WT, tmp_path / "killed", 2)
    assert resumed == weighed(model, windows_WT, tmp_path / "whole")[2]


def test_progress_is_shown_by_the_block_and_counts_the_passes_that_are_there(
    random_model, windows_WT, tmp_path, monkeypatch, capsys
):
    model = random_model("llama", num_hidden_layers=3)
    monkeypatch.setattr(stage, "tqdm", partial(tqdm, disable=False, mininterval=0, miniters=1))
    with pytest.raises(KilledError):
        weighed(model, windows_WT, tmp_path, 2, dying_workspace(token_weights_file(2)))
    assert " 1/6 " in capsys.readouterr().err
    weighed(model, windows_WT, tmp_path, 2)
    shown = capsys.readouterr().err
    assert " 2/6 " not in shown
    assert shown.index(" 3/6 ") < shown.index(" 6/6 ")


def test_a_pass_holds_at_least_one_batch_and_no_more_hidden_states_than_its_memory():
    assert batches_of_a_pass(blocks=80, hidden_size=16384, batch_tokens=65536, value_bytes=4, ram=0) == 1
    batch_bytes = 29 * 1536 * 8192 * 2
    for ram, most in ((0, PASS_BYTES), (1 << 40, 1 << 38)):
        at_once = batches_of_a_pass(blocks=28, hidden_size=1536, batch_tokens=8192, value_bytes=2, ram=ram)
        assert at_once * batch_bytes <= most < (at_once + 1) * batch_bytes


def test_tokens_of_a_mixture_are_weighted_but_for_its_experts_which_see_some_of_them(windows_WT, tmp_path):
    model = random_mixture("mixtral", num_hidden_layers=1)
    prepare_model(model)
    weights, sites, _ = weighed(model, windows_WT, tmp_path)
    attention = {f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"}
    assert attention <= sites.keys()
    assert not [name for name in sites if ".experts." in name]
    assert {sites[name] for name in attention} <= weights.keys()


def test_gradients_that_overflow_are_refused(random_model, windows_WT, tmp_path):
    """The smaller the residual stream is, the larger are gradients behind a norm that divides by it."""
    model = random_model("llama", rms_norm_eps=0.0).float()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e-18)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-18)
            layer.mlp.down_proj.weight.mul_(1e-18)
    with pytest.raises(ModelError, match=r"the gradients of model.layers.*_proj hold NaN or infinities.* overflow"):
        weighed(model, windows_WT, tmp_path)
