"""A block through its transforms and rounding, on tiny random models of several families."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import first_block
from safetensors.torch import load, save

from lqer.formats import Int, MXInt
from lqer.methods.block import loss_of, tune_block
from lqer.methods.block_state import BlockState
from lqer.models.structure import block_linears
from lqer.rounding import Adaptive
from lqer.rounding.adaptive import DivergedError
from lqer.transforms import Awq, Clip, Lwc
from lqer.transforms.block_function import BlockFunction
from lqer.transforms.block_problem import BlockProblem

W2 = Int(bits=2, block_size=16)
QUICK = Adaptive(steps=6, batch_size=2, learning_rate=3e-2, scale_learning_rate=1e-2, soft_shares=(0.6, 0.3, 0.1, 0.02))
FAMILIES = ["llama", "qwen3", "opt", "phi3", "gemma3"]


def problem_of(model, windows_WT, number_format=W2, activation=None, kept=None) -> BlockProblem:
    """The first block on inputs that differ from those its targets come from, as in a quantized stream."""
    _, call, hidden = first_block(model, windows_WT[:1])
    _, _, hidden = first_block(model, windows_WT)
    hidden = hidden.clone()
    # A channel of the residual stream that stands out, as they do in trained models.
    hidden[..., 3] *= 8
    with torch.no_grad():
        targets = call({}, hidden)
    inputs = hidden + 0.02 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    linears = block_linears(call.block)
    activations = None if activation is None else dict.fromkeys(linears, activation)
    call = BlockFunction(call.block, call.args, call.kwargs, activations)
    return BlockProblem(call, inputs, targets, dict.fromkeys(linears, number_format), 2, kept_dtypes=kept or {})


def rounded_losses(problem, *transforms, rounding=None):
    tuned = tune_block(problem, transforms, rounding)
    return loss_of(problem, tuned.parameters, tuned.rounded)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_lowers_the_blocks_loss(random_model, windows_WT, family):
    problem = problem_of(random_model(family), windows_WT)
    nearest = {name: W2.quantize(problem.call.block.get_submodule(name).weight) for name in problem.formats}
    plain = loss_of(problem, {}, nearest)
    clipped = rounded_losses(problem, Clip())
    adaptive = rounded_losses(problem, Awq(), Clip(), rounding=QUICK)
    assert clipped < plain
    assert adaptive < 0.8 * rounded_losses(problem, Awq(), Clip())
    assert adaptive < 0.8 * plain


def test_learnt_ranges_lower_the_loss_and_are_the_start_of_adaptive_rounding(random_model, windows_WT):
    problem = problem_of(random_model("llama"), windows_WT)
    nearest = {name: W2.quantize(problem.call.block.get_submodule(name).weight) for name in problem.formats}
    learnt = tune_block(problem, [Lwc(epochs=15, batch_size=2, both_targets=True)], None)
    assert len(learnt.notes["lwc"]) == 15
    assert learnt.notes["loss"]["end"] < loss_of(problem, {}, nearest)
    frozen = Adaptive(steps=4, learning_rate=3e-2, tune_scales=False, soft_shares=(0.5, 0.1))
    adaptive = tune_block(problem, [Lwc(epochs=15, batch_size=2, both_targets=True)], frozen)
    assert adaptive.notes["loss"]["start"] == pytest.approx(learnt.notes["loss"]["end"])
    for name, start in learnt.rounded.items():
        assert torch.equal(adaptive.rounded[name].parts["scales"], start.parts["scales"])


def test_the_block_is_left_as_it_was_and_only_weights_and_neighbours_change(random_model, windows_WT):
    problem = problem_of(random_model("llama"), windows_WT)
    before = copy.deepcopy(problem.call.block.state_dict())
    tuned = tune_block(problem, [Awq(), Clip()], QUICK)
    assert all(torch.equal(tensor, before[name]) for name, tensor in problem.call.block.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in problem.call.block.modules())
    assert tuned.rounded.keys() == problem.formats.keys()
    weights = {f"{name}.weight" for name in problem.formats}
    assert tuned.parameters.keys() - weights == {"input_layernorm.weight", "post_attention_layernorm.weight"}


def test_neighbours_are_kept_in_their_own_dtypes_and_weights_in_float32(random_model, windows_WT):
    model = random_model("llama").bfloat16().float()
    kept = dict.fromkeys(model.model.layers[0].state_dict(), torch.bfloat16)
    tuned = tune_block(problem_of(model, windows_WT, kept=kept), [Awq()], None)
    assert tuned.parameters["input_layernorm.weight"].dtype == torch.bfloat16
    assert tuned.parameters["self_attn.q_proj.weight"].dtype == torch.float32
    assert not tuned.rounded


def test_a_skipped_linear_is_not_rounded_and_its_site_is_not_scaled(random_model, windows_WT):
    problem = problem_of(random_model("llama"), windows_WT)
    del problem.formats["self_attn.k_proj"]
    tuned = tune_block(problem, [Awq(), Clip()], QUICK)
    assert "self_attn.k_proj" not in tuned.rounded
    assert "input_layernorm.weight" not in tuned.parameters
    assert len(tuned.rounded) == 6


@pytest.mark.parametrize(
    ("number_format", "activation"),
    [
        (MXInt(bits=3, block_size=16), None),
        (Int(bits=4, block_size="row"), Int(bits=4, block_size="row", scale_dtype="float32")),
    ],
    ids=["mxint", "w4a4 per token"],
)
def test_mxint_weights_and_rounded_activations_train_too(random_model, windows_WT, number_format, activation):
    problem = problem_of(random_model("llama"), windows_WT, number_format, activation)
    tuned = tune_block(problem, [Awq(), Clip()], QUICK)
    assert tuned.notes["loss"]["end"] < tuned.notes["loss"]["start"]


def test_queries_and_keys_keep_their_ranges(random_model, windows_WT):
    found = tune_block(problem_of(random_model("qwen3"), windows_WT), [Clip()], None).notes["clip"]
    assert [name for name, factor in found.items() if factor == 1] == ["self_attn.q_proj", "self_attn.k_proj"]
    assert sum(factor < 0.95 for factor in found.values()) == 5


LWC = Lwc(epochs=3, batch_size=2)


@pytest.mark.parametrize(
    ("transforms", "rounding", "states"),
    [([Awq(), Clip()], QUICK, 2 + 4), ([Awq(), LWC], QUICK, 1 + 3 + 1 + 4), ([LWC], None, 3 + 1), ([], QUICK, 4)],
    ids=["awq, clip, adaptive", "awq, lwc, adaptive", "lwc", "adaptive"],
)
def test_going_on_from_any_state_gives_the_same_bytes(random_model, windows_WT, transforms, rounding, states):
    model = random_model("llama")
    kept = dict.fromkeys(model.model.layers[0].state_dict(), torch.bfloat16)
    problem = problem_of(model, windows_WT, kept=kept)
    files = []

    def tune(state, keep):
        told = []
        tuned = tune_block(problem, transforms, rounding, state, keep, lambda *progress: told.append(progress))
        return tuned, told

    whole, told = tune(None, lambda state: files.append(save(state.tensors())))
    assert len(files) == states
    for file in files:
        resumed, again = tune(BlockState.from_tensors(load(file), problem), lambda state: None)
        assert again == told[len(told) - len(again) :]
        assert len(again) < len(told)
        assert resumed.notes == whole.notes
        assert resumed.parameters.keys() == whole.parameters.keys()
        for name, parameter in whole.parameters.items():
            assert parameter.dtype == resumed.parameters[name].dtype
            assert torch.equal(parameter, resumed.parameters[name])
        for name, tensor in whole.rounded.items():
            assert tensor.format == resumed.rounded[name].format
            assert all(torch.equal(tensor.parts[part], resumed.rounded[name].parts[part]) for part in tensor.parts)


def test_progress_is_told_of_every_part_and_round(random_model, windows_WT):
    told = []
    problem = problem_of(random_model("llama"), windows_WT)
    tuned = tune_block(problem, [Awq(), LWC], QUICK, progress=lambda *progress: told.append(progress))
    assert [what for what, _, _, _ in told] == ["awq", *["lwc"] * 3, *["rounding"] * 4]
    assert told[3] == ("lwc", 3, 3, tuned.notes["lwc"][-1])
    assert told[-1] == ("rounding", 4, 4, tuned.notes["loss"]["rounds"][-1])


def test_inputs_that_are_not_finite_stop_with_the_last_sound_state(random_model, windows_WT):
    problem = problem_of(random_model("llama"), windows_WT)
    states = []

    def break_inputs(state):
        states.append(state)
        if state.steps == 2:
            problem.inputs_STD.fill_(torch.nan)

    with pytest.raises(DivergedError, match="round 3 of 4 diverged"):
        tune_block(problem, [Clip()], QUICK, None, break_inputs)
    assert [state.steps for state in states] == [0, 1, 2]


def test_bfloat16_products_and_states_end_below_the_start_too(random_model, windows_WT):
    problem = problem_of(random_model("llama"), windows_WT)
    half = BlockProblem(
        problem.call, problem.inputs_STD.bfloat16(), problem.targets_STD.bfloat16(), problem.formats, 2, torch.bfloat16
    )
    tuned = tune_block(half, [Awq(), Clip()], QUICK)
    assert tuned.notes["loss"]["end"] < 0.8 * tuned.notes["loss"]["start"]
