"""Weights of tokens in statistics, against the original model's own residual stream; statistics of rounded inputs.

Shapes: T tokens of the whole text, I in_features, D hidden size.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import resident

from lqer.formats import MXInt
from lqer.methods.inputs import InputRounding
from lqer.models.structure import block_linears, within_block
from lqer.models.walker import walk_blocks
from lqer.stages.base import identity
from lqer.stages.gather import CalibrationText, observe_block
from lqer.statistics import Hessian


@pytest.fixture
def text(windows_WT):
    return CalibrationText(windows_WT, 2, 24, "residual")


@torch.no_grad()
def forward_pass(model, index, windows_WT) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The inputs (T, I) of all linears of a Llama block, and the residual stream (T, D) behind its two writers."""
    layer = model.model.layers[index]
    inputs, streams = {name: [] for name in block_linears(layer)}, {"self_attn.o_proj": [], "mlp.down_proj": []}

    def keep_input(batches):
        return lambda _, args: batches.append(args[0].flatten(0, -2))

    hooks = [
        *(linear.register_forward_pre_hook(keep_input(inputs[name])) for name, linear in block_linears(layer).items()),
        layer.post_attention_layernorm.register_forward_pre_hook(keep_input(streams["self_attn.o_proj"])),
        layer.register_forward_hook(lambda _, args, output: streams["mlp.down_proj"].append(output.flatten(0, -2))),
    ]
    for ids_BT in windows_WT.split(2):
        model(ids_BT)
    for hook in hooks:
        hook.remove()
    return tuple({name: torch.cat(batches) for name, batches in seen.items()} for seen in (inputs, streams))


def expected_hessian(x_TI, stream_TD=None):
    x_TI = x_TI.double()
    weights_T = torch.ones(len(x_TI)).double() if stream_TD is None else 1 / stream_TD.double().square().sum(-1)
    return (x_TI.T * (weights_T / weights_T.mean())) @ x_TI / len(x_TI)


def test_tokens_count_relative_to_the_stream_that_a_linear_writes_to(random_model, windows_WT, text):
    model = random_model("llama")
    inputs, stream = forward_pass(model, 0, windows_WT)
    found = observe_block(next(walk_blocks(resident(model), windows_WT, 2)), None, text, {Hessian()})
    plain = observe_block(
        next(walk_blocks(resident(model), windows_WT, 2)), None, replace(text, token_weights="none"), {Hessian()}
    )
    for name, x_TI in inputs.items():
        statistics = found.of(f"model.layers.0.{name}")
        expected_II = expected_hessian(x_TI, stream.get(name))
        torch.testing.assert_close(statistics["hessian"].double(), expected_II, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(statistics["mean_square"].double(), expected_II.diagonal(), rtol=1e-5, atol=1e-6)
        for kind in ("mean_abs", "sample"):
            assert torch.equal(statistics[kind], plain.of(f"model.layers.0.{name}")[kind])
        if name not in stream:
            assert torch.equal(statistics["hessian"], plain.of(f"model.layers.0.{name}")["hessian"])


@torch.no_grad()
def test_the_stream_is_that_of_the_original_model_whatever_the_inputs(random_model, windows_WT, text):
    original, changed = random_model("llama"), random_model("llama")
    changed.load_state_dict(original.state_dict())
    for parameter in changed.model.layers[0].parameters():
        parameter.mul_(1.1)
    runs = [walk_blocks(resident(model), windows_WT, 2) for model in (original, changed)]
    for first in [next(run) for run in runs]:
        first.forward()
    original_run, changed_run = (next(run) for run in runs)
    found = observe_block(changed_run, original_run, text, {Hessian()})
    stream, inputs = forward_pass(original, 1, windows_WT)[1], forward_pass(changed, 1, windows_WT)[0]
    for name, x_TI in inputs.items():
        expected_II = expected_hessian(x_TI, stream.get(name))
        hessian_II = found.of(f"model.layers.1.{name}")["hessian"]
        torch.testing.assert_close(hessian_II.double(), expected_II, rtol=1e-5, atol=1e-6)


def test_tokens_count_by_the_weights_of_their_site(random_model, windows_WT):
    """Those that "gradient" has found: of every linear, whatever it writes to, and of each window of the whole text."""
    model, generator = random_model("llama"), torch.Generator().manual_seed(0)
    inputs, _ = forward_pass(model, 0, windows_WT)
    shared, own = torch.rand(2, *windows_WT.shape, generator=generator)
    weights = {
        f"model.layers.0.{name}": shared if "down" not in name else own for name in inputs if "o_proj" not in name
    }
    text = CalibrationText(windows_WT, 2, 24, "gradient", gradient_weights=weights)
    found = observe_block(next(walk_blocks(resident(model), windows_WT, 2)), None, text, {Hessian()})
    for name, x_TI in inputs.items():
        weights_WT = weights.get(f"model.layers.0.{name}", torch.ones_like(own))
        # 1 / ‖h‖² is the weight.
        expected_II = expected_hessian(x_TI, weights_WT.rsqrt().reshape(-1, 1))
        statistics = found.of(f"model.layers.0.{name}")
        torch.testing.assert_close(statistics["hessian"].double(), expected_II, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(statistics["mean_square"].double(), expected_II.diagonal(), rtol=1e-5, atol=1e-6)


def test_a_text_without_weights_has_the_key_it_always_had(windows_WT):
    plain = identity(CalibrationText(windows_WT, 2, 24))
    assert plain.keys().isdisjoint({"token_weights", "gradient_weights"})
    assert identity(CalibrationText(windows_WT, 2, 24, "residual")) == {**plain, "token_weights": "residual"}


def observed(model, windows_WT, roundings):
    text = CalibrationText(windows_WT, 2, 24)
    run = next(walk_blocks(resident(model), windows_WT, 2))
    return observe_block(run, None, text, {Hessian()}, roundings=within_block(roundings, "model.layers.0"))


def test_statistics_of_rounded_inputs_are_those_of_the_inputs_the_layer_multiplies(random_model, windows_WT):
    model = random_model("llama")
    inputs, _ = forward_pass(model, 0, windows_WT)
    x4 = InputRounding(MXInt(4))
    found = observed(model, windows_WT, {f"model.layers.0.{name}": x4 for name in inputs})
    for name, x_TI in inputs.items():
        rounded_TI, statistics = x4.round(x_TI), found.of(f"model.layers.0.{name}")
        expected_II = expected_hessian(rounded_TI)
        torch.testing.assert_close(statistics["hessian"].double(), expected_II, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(statistics["mean_square"].double(), expected_II.diagonal(), rtol=1e-5, atol=1e-6)
    plain = observed(model, windows_WT, {})
    assert found.sites == plain.sites
    name = "model.layers.0.mlp.down_proj"
    assert not torch.equal(found.of(name)["hessian"], plain.of(name)["hessian"])


def test_linears_that_round_a_shared_input_in_their_own_way_have_statistics_of_their_own(random_model, windows_WT):
    model = random_model("llama")
    inputs, _ = forward_pass(model, 0, windows_WT)
    q, k, v = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    roundings = {q: InputRounding(MXInt(4)), v: InputRounding(MXInt(4))}
    found = observed(model, windows_WT, roundings)
    assert (found.sites[q], found.sites[k], found.sites[v]) == (q, k, q)
    x_TI = inputs["self_attn.q_proj"]
    for name, expected_TI in ((q, MXInt(4).fake_quantize(x_TI)), (k, x_TI)):
        hessian_II = found.of(name)["hessian"]
        torch.testing.assert_close(hessian_II.double(), expected_hessian(expected_TI), rtol=1e-5, atol=1e-6)
