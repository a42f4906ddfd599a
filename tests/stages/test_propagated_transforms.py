"""What block transforms and statistics of pairs are given with error propagation, and that their results are used.

Shapes: I in_features, O out_features, T tokens of the whole text, W windows, D hidden size, N tokens of a batch,
S windows of a problem.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch
from helpers import inputs_of_linears, quantize_in_memory, settings_for
from torch import Tensor, nn
from transformers import PreTrainedModel

from lqer.checkpoint.load import load_quantized
from lqer.formats import MXInt
from lqer.methods import QeraExact, RoundingOnly
from lqer.models.structure import block_linears, find_blocks
from lqer.nn.linear import output_error
from lqer.rounding import Nearest
from lqer.statistics import Statistic
from lqer.store.names import block_file, layers_file
from lqer.transforms import BlockTransform

CPU = torch.device("cpu")
BATCH_SIZE = 2
ATTENTION = {"format": MXInt(bits=8).to_dict(), "axis": "reduction"}
SCALE_I = torch.linspace(0.5, 2, 32)
W2 = MXInt(bits=2)


@dataclass(frozen=True)
class Recorder(BlockTransform):
    """Changes nothing and stores the inputs and targets that it is given, and the block's outputs on three windows."""

    seen: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    @torch.no_grad()
    def apply(self, problem, result, progress, save_state):
        outputs_WTD = problem.call({}, problem.inputs_STD[1:4])
        self.seen.append((problem.inputs_STD.clone(), problem.targets_STD.clone(), outputs_WTD))
        return result


@torch.no_grad()
def hidden_states(model: PreTrainedModel, windows_WT: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Inputs and outputs of every block."""
    states: list[tuple[Tensor, Tensor]] = []
    hooks = [
        block.register_forward_hook(
            lambda _, args, output: states.append((args[0], output[0] if isinstance(output, tuple) else output))
        )
        for block in find_blocks(model)[1]
    ]
    model(windows_WT)
    for hook in hooks:
        hook.remove()
    return states


@pytest.mark.parametrize("attention", [None, ATTENTION], ids=["attention as it is", "quantized attention"])
def test_a_block_transform_sees_inputs_of_the_quantized_and_targets_of_the_original_model(
    random_model, letter_tokenizer, text, plan, tmp_path, attention
):
    model = random_model("gemma3")
    recorder = Recorder()
    plan = replace(plan, weight=MXInt(bits=3))
    settings = settings_for(model, plan, attention, transforms=[recorder])
    quantize_in_memory(tmp_path / "recorded", model, letter_tokenizer, text, settings)
    quantize_in_memory(tmp_path / "plain", model, letter_tokenizer, text, settings_for(model, plan, attention))
    quantized = hidden_states(load_quantized(tmp_path / "recorded", CPU, verify=False), text.windows_WT)
    original = hidden_states(model, text.windows_WT)
    assert len(recorder.seen) == 3
    for i, (inputs_WTD, targets_WTD, _) in enumerate(recorder.seen):
        torch.testing.assert_close(inputs_WTD, quantized[i][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(targets_WTD, original[i][1], rtol=1e-5, atol=1e-5)
        # A transform that changes nothing changes nothing.
        name = block_file(i)
        assert (tmp_path / "recorded" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    torch.testing.assert_close(recorder.seen[0][2], original[0][1][1:4], rtol=1e-5, atol=1e-5)
    assert not torch.equal(recorder.seen[1][0], original[1][0])


class PairsAccumulator:
    def __init__(self):
        self.pairs = []

    def add(self, x_NI, original_NI, sampled_N):
        self.pairs.append(torch.stack([x_NI, original_NI]))

    def join(self, gang):
        self.pairs = [pair for of_rank in gang.gathered(self.pairs) for pair in of_rank]

    def result(self):
        return torch.cat(self.pairs, dim=1)


@dataclass(frozen=True)
class InputPairs(Statistic):
    """All inputs (2, T, I): those in the quantized model and those in the original one."""

    kind = "input-pairs"
    needs_original: ClassVar[bool] = True

    def accumulator(self, in_features, device, offload):
        return PairsAccumulator()

    def nbytes(self, in_features):
        return 0


@dataclass(frozen=True)
class RecordingNearest(Nearest):
    """Round-to-nearest that stores the input pairs it is given, linear after linear."""

    statistics: ClassVar[frozenset[Statistic]] = frozenset({InputPairs()})
    seen: list[Tensor] = field(default_factory=list, compare=False)

    def round(self, weight_OI, statistics, number_format):
        self.seen.append(statistics["input-pairs"])
        return super().round(weight_OI, statistics, number_format)


@pytest.mark.parametrize("reconstructed", [False, True])
def test_a_statistic_of_pairs_sees_the_inputs_of_both_models(
    random_model, letter_tokenizer, text, plan, tmp_path, reconstructed
):
    rounding = RecordingNearest()
    plan = replace(plan, method=RoundingOnly(), rank=0, weight=MXInt(bits=3), rounding=rounding)
    model = random_model("llama", num_hidden_layers=3)
    transforms = [Recorder()] if reconstructed else []
    quantize_in_memory(
        tmp_path, model, letter_tokenizer, text, settings_for(model, plan, ATTENTION, transforms=transforms)
    )
    quantized = hidden_states(load_quantized(tmp_path, CPU, verify=False), text.windows_WT)
    names = list(block_linears(model.model.layers[0]))
    assert len(rounding.seen) == 3 * len(names)
    inputs = inputs_of_linears(model, text.windows_WT, BATCH_SIZE)
    for i, layer in enumerate(model.model.layers):
        pairs = dict(zip(names, rounding.seen[i * len(names) :], strict=False))
        normed_TI = layer.input_layernorm(quantized[i][0]).flatten(0, -2)
        torch.testing.assert_close(pairs["self_attn.q_proj"][0], normed_TI, rtol=1e-5, atol=1e-5)
        for name in names:
            x_TI = torch.cat(inputs[f"model.layers.{i}.{name}"])
            torch.testing.assert_close(pairs[name][1], x_TI, rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class ScaleAndRound(BlockTransform):
    """Scales the inputs of gate and up, folds that into their norm, and rounds down_proj."""

    def apply(self, problem, result, progress, save_state):
        norm = "post_attention_layernorm.weight"
        parameters = {norm: problem.call.block.get_parameter(norm).detach() / SCALE_I}
        for linear in ("mlp.gate_proj", "mlp.up_proj"):
            parameters[f"{linear}.weight"] = result.weight(problem, linear) * SCALE_I
        rounded = {"mlp.down_proj": W2.quantize(result.weight(problem, "mlp.down_proj"))}
        return replace(result, parameters=parameters, rounded=rounded)


def test_the_result_of_a_block_transform_is_stored_and_runs(random_model, letter_tokenizer, text, plan, tmp_path):
    plan = replace(plan, method=QeraExact(), weight=MXInt(bits=3))
    model = random_model("llama")
    # Output errors are judged on the inputs of all tokens.
    text = replace(text, error_tokens=text.windows_WT.numel())
    settings = settings_for(model, plan, transforms=[ScaleAndRound()])
    found = quantize_in_memory(tmp_path, model, letter_tokenizer, text, settings)
    loaded = load_quantized(tmp_path, CPU, verify=False)
    for i, layer in enumerate(model.model.layers):
        mlp = loaded.model.layers[i].mlp
        assert torch.equal(mlp.down_proj.weight, W2.fake_quantize(layer.mlp.down_proj.weight.detach()))
        assert mlp.down_proj.low_rank_a is not None
        norm_I = loaded.model.layers[i].post_attention_layernorm.weight
        torch.testing.assert_close(norm_I.data, layer.post_attention_layernorm.weight.detach() / SCALE_I)
        rounded_OI = MXInt(bits=3).fake_quantize(layer.mlp.gate_proj.weight.detach() * SCALE_I)
        assert torch.equal(mlp.gate_proj.weight, rounded_OI)
    # Statistics are those of the transformed block.
    inputs = inputs_of_linears(model, text.windows_WT, BATCH_SIZE)["model.layers.0.mlp.gate_proj"]
    x_TI = torch.cat(inputs) / SCALE_I
    weight_OI = model.model.layers[0].mlp.gate_proj.weight.detach() * SCALE_I
    row = next(row for row in found.json(layers_file(0)) if row["name"].endswith("gate_proj"))
    expected = float(output_error(weight_OI, MXInt(bits=3).fake_quantize(weight_OI), x_TI))
    assert row["output_error_before"] == pytest.approx(expected, rel=1e-4)
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
