"""A block through its transforms and rounding, on tiny random models of several families."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import first_block
from safetensors.torch import load, save

from lqer.formats import Int, MXInt
from lqer.methods.block import KEPT_START, output_loss, reconstruct_block
from lqer.models.structure import block_linears
from lqer.rounding import Adaptive
from lqer.rounding.adaptive import DivergedError
from lqer.transforms import Awq, Clip, Lwc
from lqer.transforms.block_function import BlockFunction
from lqer.transforms.block_problem import BlockProblem
from lqer.transforms.block_result import BlockResult

W2 = Int(bits=2, block_size=16)
QUICK = Adaptive(
    steps=6, batch_size=2, learning_rate=3e-2, scale_learning_rate=1e-2, soft_fractions=(0.6, 0.3, 0.1, 0.02)
)
FAMILIES = ["llama", "qwen3", "opt", "phi3", "gemma3"]


def problem_of(model, windows_WT, number_format=W2, activation=None, stored=None) -> BlockProblem:
    """The first block on inputs that differ from those of its targets, as under error propagation."""
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
    return BlockProblem(call, inputs, targets, dict.fromkeys(linears, number_format), 2, stored_dtypes=stored or {})


def rounded_losses(problem, *transforms, rounding=None):
    result = reconstruct_block(problem, transforms, rounding)
    return output_loss(problem, result.parameters, result.rounded)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_lowers_the_blocks_loss(random_model, windows_WT, family):
    problem = problem_of(random_model(family), windows_WT)
    nearest = {name: W2.quantize(problem.call.block.get_submodule(name).weight) for name in problem.formats}
    plain = output_loss(problem, {}, nearest)
    clipped = rounded_losses(problem, Clip())
    adaptive = rounded_losses(problem, Awq(), Clip(), rounding=QUICK)
    assert clipped < plain
    assert adaptive < 0.8 * rounded_losses(problem, Awq(), Clip())
    assert adaptive < 0.8 * plain


def test_learned_ranges_lower_the_loss_and_are_the_start_of_adaptive_rounding(random_model, windows_WT):
    problem = problem_of(random_model("llama"), windows_WT)
    nearest = {name: W2.quantize(problem.call.block.get_submodule(name).weight) for name in problem.formats}
    learned = reconstruct_block(problem, [Lwc(epochs=15, batch_size=2, both_targets=True)], None)
    assert len(learned.notes["lwc"]) == 15
    assert learned.notes["loss"]["end"] < output_loss(problem, {}, nearest)
    frozen = Adaptive(steps=4, learning_rate=3e-2, tune_scales=False, soft_fractions=(0.5, 0.1))
    adaptive = reconstruct_block(problem, [Lwc(epochs=15, batch_size=2, both_targets=True)], frozen)
    assert adaptive.notes["loss"]["start"] == pytest.approx(learned.notes["loss"]["end"])
    for name, start in learned.rounded.items():
        assert torch.equal(adaptive.rounded[name].parts["scales"], start.parts["scales"])


def test_the_block_is_left_as_it_was_and_only_weights_and_neighbours_change(random_model, windows_WT):
    problem = problem_of(random_model("llama"), windows_WT)
    before = copy.deepcopy(problem.call.block.state_dict())
    result = reconstruct_block(problem, [Awq(), Clip()], QUICK)
    assert all(torch.equal(tensor, before[name]) for name, tensor in problem.call.block.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in problem.call.block.modules())
    assert result.rounded.keys() == problem.formats.keys()
    weights = {f"{name}.weight" for name in problem.formats}
    assert result.parameters.keys() - weights == {"input_layernorm.weight", "post_attention_layernorm.weight"}


def test_neighbours_are_stored_in_their_own_dtypes_and_weights_in_float32(random_model, windows_WT):
    model = random_model("llama").bfloat16().float()
    stored = dict.fromkeys(model.model.layers[0].state_dict(), torch.bfloat16)
    result = reconstruct_block(problem_of(model, windows_WT, stored=stored), [Awq()], None)
    assert result.parameters["input_layernorm.weight"].dtype == torch.bfloat16
    assert result.parameters["self_attn.q_proj.weight"].dtype == torch.float32
    assert not result.rounded


def test_a_skipped_linear_is_not_rounded_and_its_site_is_not_scaled(random_model, windows_WT):
    problem = problem_of(random_model("llama"), windows_WT)
    del problem.formats["self_attn.k_proj"]
    result = reconstruct_block(problem, [Awq(), Clip()], QUICK)
    assert "self_attn.k_proj" not in result.rounded
    assert "input_layernorm.weight" not in result.parameters
    assert len(result.rounded) == 6


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
    result = reconstruct_block(problem, [Awq(), Clip()], QUICK)
    assert result.notes["loss"]["end"] < result.notes["loss"]["start"]


def test_queries_and_keys_keep_their_ranges(random_model, windows_WT):
    found = reconstruct_block(problem_of(random_model("qwen3"), windows_WT), [Clip()], None).notes["clip"]
    assert [name for name, factor in found.items() if factor == 1] == ["self_attn.q_proj", "self_attn.k_proj"]
    assert sum(factor < 0.95 for factor in found.values()) == 5


LWC = Lwc(epochs=3, batch_size=2)


@pytest.mark.parametrize(
    ("transforms", "rounding", "states"),
    [([Awq(), Clip()], QUICK, 2 + 4), ([Awq(), LWC], QUICK, 1 + 3 + 1 + 4), ([LWC], None, 3 + 1), ([], QUICK, 4)],
    ids=["awq, clip, adaptive", "awq, lwc, adaptive", "lwc", "adaptive"],
)
def test_resuming_from_any_state_gives_the_same_bytes(random_model, windows_WT, transforms, rounding, states):
    model = random_model("llama")
    stored = dict.fromkeys(model.model.layers[0].state_dict(), torch.bfloat16)
    problem = problem_of(model, windows_WT, stored=stored)
    files = []

    def reconstruct(result, save_state):
        told = []
        result = reconstruct_block(
            problem, transforms, rounding, result, save_state, lambda *progress: told.append(progress)
        )
        return result, told

    whole, told = reconstruct(None, lambda state: files.append(save(state.tensors())))
    assert len(files) == states
    for file in files:
        resumed, again = reconstruct(BlockResult.from_tensors(load(file), problem), lambda state: None)
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
    result = reconstruct_block(problem, [Awq(), LWC], QUICK, progress=lambda *progress: told.append(progress))
    assert [what for what, _, _, _ in told] == ["awq", *["lwc"] * 4, *["rounding"] * 5]
    assert told[4] == ("lwc", 3, 3, result.notes["lwc"][-1])
    assert told[-1] == ("rounding", 4, 4, result.notes["loss"]["rounds"][-1])


def test_inputs_that_are_not_finite_stop_with_the_last_sound_state(random_model, windows_WT):
    problem = problem_of(random_model("llama"), windows_WT)
    states = []

    def break_inputs(state):
        states.append(state)
        if state.steps == 2:
            problem.inputs_STD.fill_(torch.nan)

    with pytest.raises(DivergedError, match="round 3 of 4 diverged"):
        reconstruct_block(problem, [Clip()], QUICK, None, break_inputs)
    assert [state.steps for state in states] == [0, 1, 2]


def test_bfloat16_products_and_states_end_below_the_start_too(random_model, windows_WT):
    problem = problem_of(random_model("llama"), windows_WT)
    half = BlockProblem(
        problem.call, problem.inputs_STD.bfloat16(), problem.targets_STD.bfloat16(), problem.formats, 2, torch.bfloat16
    )
    result = reconstruct_block(half, [Awq(), Clip()], QUICK)
    assert result.notes["loss"]["end"] < 0.8 * result.notes["loss"]["start"]


@pytest.mark.parametrize(
    ("transforms", "rounding"),
    [
        ([Lwc(epochs=2, batch_size=2, learning_rate=1e30)], None),
        ([], Adaptive(steps=2, batch_size=2, learning_rate=1e30, soft_fractions=(0.5, 0.1))),
    ],
)
def test_training_that_ends_worse_than_it_started_keeps_the_start(random_model, windows_WT, transforms, rounding):
    # At two bits, weights of zero may do better than rounding to nearest.
    w4 = Int(bits=4, block_size=16)
    problem = problem_of(random_model("llama"), windows_WT, w4)
    nearest = {name: w4.quantize(problem.call.block.get_submodule(name).weight) for name in problem.formats}
    result = reconstruct_block(problem, transforms, rounding)
    assert result.notes[KEPT_START]
    assert result.notes["loss"]["end"] == pytest.approx(output_loss(problem, {}, nearest))
    for name, start in nearest.items():
        assert torch.equal(result.rounded[name].dequantize(), start.dequantize())
