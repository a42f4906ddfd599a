"""What experts are calibrated on: their own tokens, others where these are few, or all; against plain sums.

Shapes: T tokens of the whole text, E experts, K experts of a token, N tokens of an expert, I in_features.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import resident
from mixtures import random_mixture

from lqer.errors import ModelError
from lqer.models.loaders import OpenedModel
from lqer.models.structure import block_linears, prepare_model
from lqer.models.walker import walk_blocks
from lqer.stages import gather, gather_experts
from lqer.stages.gather import CalibrationText, observe_block
from lqer.stages.gather_experts import ROUTED_TOKENS, ExpertTokens, passes_of
from lqer.statistics import Hessian, Mismatch
from lqer.store.offload import Offload

LAYER = "model.layers.0.mlp.experts"
EXPERTS = 4
HESSIAN = frozenset({Hessian()})


@pytest.fixture(scope="module")
def model():
    model = random_mixture("mixtral")
    prepare_model(model)
    return model


@pytest.fixture
def text(windows_WT):
    return CalibrationText(windows_WT, 2, 24, experts=ExpertTokens(minimum=0))


class Spill(Offload):
    """Tells where tensors on disk are."""

    @property
    def addresses(self) -> set[int]:
        return set(self._mapped)


def observed(model, text, statistics=HESSIAN):
    return observe_block(next(walk_blocks(resident(model), text.windows_WT, text.batch_size)), None, text, statistics)


@torch.no_grad()
def layer_inputs(model, windows_WT):
    """The inputs (T, I) of the first layer's experts, and where the router sends them (T, K)."""
    seen = []
    hook = model.get_submodule(LAYER).register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    model(windows_WT)
    hook.remove()
    return seen[0]


def inputs_of(model, index, x_TI):
    """What each linear of an expert gets for these tokens."""
    expert = model.get_submodule(LAYER).get_submodule(str(index))
    hidden = torch.nn.functional.silu(expert.gate_proj(x_TI)) * expert.up_proj(x_TI)
    return {"gate_proj": x_TI, "up_proj": x_TI, "down_proj": hidden}


def assert_hessians(found, model, tokens_of):
    for index in range(EXPERTS):
        for name, x_NI in inputs_of(model, index, tokens_of(index)).items():
            expected_II = x_NI.double().T @ x_NI.double() / len(x_NI)
            hessian_II = found.of(f"{LAYER}.{index}.{name}")["hessian"]
            torch.testing.assert_close(hessian_II.double(), expected_II, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_an_experts_inputs_are_the_tokens_that_it_is_sent(model, text):
    x_TI, top_k_index = layer_inputs(model, text.windows_WT)
    found = observed(model, text)
    assert_hessians(found, model, lambda index: x_TI[(top_k_index == index).any(1)])
    counts = [int((top_k_index == index).sum()) for index in range(EXPERTS)]
    assert [found.routed_tokens(f"{LAYER}.{index}.up_proj") for index in range(EXPERTS)] == counts
    assert found.routed_tokens("model.layers.0.self_attn.q_proj") is None


def test_gate_and_up_of_an_expert_are_one_site_and_experts_are_several(model, text):
    sites = observed(model, text).sites
    for index in range(EXPERTS):
        assert sites[f"{LAYER}.{index}.up_proj"] == sites[f"{LAYER}.{index}.gate_proj"] == f"{LAYER}.{index}.gate_proj"
        assert sites[f"{LAYER}.{index}.down_proj"] == f"{LAYER}.{index}.down_proj"


def test_sums_do_not_depend_on_the_size_of_the_batches(model, text):
    small, large = (observed(model, replace(text, batch_size=size, experts=ExpertTokens())) for size in (1, 5))
    for name, tensor in small.tensors.items():
        if name.endswith((".hessian", ".mean_square", ".routed_tokens")):
            torch.testing.assert_close(tensor, large.tensors[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("linear", ["self_attn.q_proj", f"{LAYER.removeprefix('model.layers.0.')}.1.down_proj"])
def test_a_pass_whose_outputs_nobody_gets_ends_at_the_last_input_with_the_same_statistics(model, text, linear):
    outputs, ends = [], []
    run = next(walk_blocks(resident(model), text.windows_WT, text.batch_size))
    hook = run.block.register_forward_hook(lambda *_: ends.append(1))
    whole = observe_block(
        run, None, text, HESSIAN, lambda batch, output_BTD: outputs.append(output_BTD), linears=[linear]
    )
    assert len(ends) == len(outputs) == text.batches > 2
    ended = observe_block(run, None, text, HESSIAN, linears=[linear])
    hook.remove()
    # The first batch tells what is called.
    assert len(ends) == text.batches + 1
    assert whole.tensors.keys() == ended.tensors.keys()
    assert all(torch.equal(tensor, ended.tensors[name]) for name, tensor in whole.tensors.items())


@torch.no_grad()
def test_an_expert_that_is_sent_too_few_tokens_gets_others_from_all_over_the_text(model, text):
    minimum = 40
    x_TI, top_k_index = layer_inputs(model, text.windows_WT)
    total = len(x_TI)
    kept_TI = x_TI[torch.arange(minimum) * total // minimum]

    def tokens_of(index):
        own = x_TI[(top_k_index == index).any(1)]
        lacking = max(minimum - len(own), 0)
        return torch.cat([own, kept_TI[torch.arange(lacking) * minimum // max(lacking, 1)]])

    sizes = [len(tokens_of(index)) for index in range(EXPERTS)]
    assert min(int((top_k_index == index).sum()) for index in range(EXPERTS)) < minimum <= min(sizes)
    found = observed(model, replace(text, experts=ExpertTokens(minimum=minimum)))
    assert_hessians(found, model, tokens_of)


@torch.no_grad()
def test_an_expert_that_is_sent_nothing_has_statistics_of_tokens_of_its_layer(text):
    model = random_mixture("mixtral", num_local_experts=8)
    prepare_model(model)
    rows = model.model.layers[0].mlp.gate.weight
    # Of two experts a token, those of the first four whose scores have its sign.
    rows.copy_(torch.tensor([1.0, 2, -1, -2, 0, 0, 0, 0])[:, None] * rows[0])
    found = observed(model, replace(text, experts=ExpertTokens(minimum=8)))
    assert [found.routed_tokens(f"{LAYER}.{index}.up_proj") for index in range(4, 8)] == [0] * 4
    for index in range(8):
        for name in ("gate_proj", "down_proj"):
            statistics = found.of(f"{LAYER}.{index}.{name}")
            assert statistics["mean_abs"].max() > 0
            assert len(statistics["sample"]) > 0


@torch.no_grad()
@pytest.mark.parametrize("of", ["routed", "all"])
def test_nothing_is_known_of_experts_that_no_text_reaches(text, of):
    model = random_mixture("mixtral")
    prepare_model(model)
    # As of those that are for images.
    model.model.layers[0].mlp.forward = lambda x_BTD: x_BTD
    found = observed(model, replace(text, experts=ExpertTokens(of)))
    assert found.of("model.layers.0.self_attn.o_proj")["mean_abs"].max() > 0
    with pytest.raises(ModelError, match=r"experts\.0\.up_proj was never reached by the calibration text"):
        found.of(f"{LAYER}.0.up_proj")


@torch.no_grad()
def test_all_tokens_are_every_experts(model, text):
    x_TI, _ = layer_inputs(model, text.windows_WT)
    found = observed(model, replace(text, experts=ExpertTokens("all")))
    assert_hessians(found, model, lambda index: x_TI)


def test_experts_keep_as_large_a_sample_as_their_tokens_allow(model, text):
    found = observed(model, text)
    for index in range(EXPERTS):
        sent = found.routed_tokens(f"{LAYER}.{index}.up_proj")
        assert min(sent, 12) <= len(found.of(f"{LAYER}.{index}.up_proj")["sample"]) <= 24 + 3


@torch.no_grad()
def test_inputs_are_paired_with_the_original_models_of_the_same_tokens(model, text):
    original, changed = model, copy.deepcopy(model)
    for parameter in changed.model.layers[0].self_attn.parameters():
        parameter.mul_(1.2)
    runs = [next(walk_blocks(resident(one), text.windows_WT, text.batch_size)) for one in (original, changed)]
    found = observe_block(runs[1], runs[0], text, {Hessian(), Mismatch()})
    x_TI, top_k_index = layer_inputs(changed, text.windows_WT)
    theirs_TI, _ = layer_inputs(original, text.windows_WT)
    for index in range(EXPERTS):
        mine = (top_k_index == index).any(1)
        own, others = inputs_of(changed, index, x_TI[mine]), inputs_of(original, index, theirs_TI[mine])
        for name, x_NI in own.items():
            expected_II = (others[name] - x_NI).double().T @ x_NI.double() / len(x_NI)
            mismatch_II = found.of(f"{LAYER}.{index}.{name}")["mismatch"]
            assert mismatch_II.abs().max() > 1e-3
            torch.testing.assert_close(mismatch_II.double(), expected_II, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_tokens_of_what_experts_write_count_relative_to_the_stream(model, text):
    x_TI, top_k_index = layer_inputs(model, text.windows_WT)
    streams = []
    hook = model.model.layers[0].register_forward_hook(lambda _, args, output: streams.append(output.flatten(0, -2)))
    model(text.windows_WT)
    hook.remove()
    found = observed(model, replace(text, token_weights="residual"))
    for index in range(EXPERTS):
        mine = (top_k_index == index).any(1)
        x_NI = inputs_of(model, index, x_TI[mine])["down_proj"].double()
        weights_N = 1 / streams[0][mine].double().square().sum(-1)
        expected_II = (x_NI.T * weights_N) @ x_NI / weights_N.sum()
        hessian_II = found.of(f"{LAYER}.{index}.down_proj")["hessian"]
        torch.testing.assert_close(hessian_II.double(), expected_II, rtol=1e-4, atol=1e-6)


def test_sums_that_would_fill_a_gpu_are_gathered_in_several_passes(model, monkeypatch):
    block = model.model.layers[0]
    names = list(block_linears(block))
    # Gate and up of an expert share sums.
    of_one = 8 * (32**2 + 48**2)
    monkeypatch.setattr(gather_experts, "PASS_BYTES", 2 * of_one)
    run = SimpleNamespace(block=block, device=torch.device("cuda"))
    passes = passes_of(run, names, [Hessian()])
    assert sorted(name for part in passes for name in part) == sorted(names)
    assert [sum(".experts." in name for name in part) for part in passes] == [6, 6]
    monkeypatch.setattr(gather_experts, "PASS_BYTES", 2 * of_one - 1)
    assert len(passes_of(run, names, [Hessian()])) == 4
    assert len(passes_of(SimpleNamespace(block=block, device=torch.device("cpu")), names, [Hessian()])) == 1


def test_statistics_beyond_the_budget_of_memory_are_on_disk_with_the_same_values(model, text, tmp_path, monkeypatch):
    """Of a run on a CPU; and those of one pass after the other, which wait there until the block is done."""
    in_memory = observed(model, text)
    offload = Spill(0, tmp_path)
    opened = OpenedModel.resident(model, torch.device("cpu"), offload)
    on_disk = observe_block(next(walk_blocks(opened, text.windows_WT, text.batch_size)), None, text, {Hessian()})
    monkeypatch.setattr(gather, "passes_of", lambda run, names, statistics: [[name] for name in names])
    in_passes = observe_block(next(walk_blocks(opened, text.windows_WT, text.batch_size)), None, text, {Hessian()})
    for found in (on_disk, in_passes):
        statistics = [name for name in found.tensors if not name.endswith(ROUTED_TOKENS)]
        assert len(statistics) >= len(in_memory.tensors) - 1
        assert {found.tensors[name].data_ptr() for name in statistics} <= offload.addresses
    for linear in in_memory.sites:
        for found in (on_disk, in_passes):
            assert all(torch.equal(found.of(linear)[kind], x) for kind, x in in_memory.of(linear).items())
