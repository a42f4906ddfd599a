"""Error propagation against a whole model in memory whose weights are replaced block by block.

Shapes: I in_features, O out_features, T tokens of the whole text, W windows, D hidden size.
"""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch
from helpers import resident, settings_for
from killing import KilledError, dying_workspace
from torch import Tensor, nn
from transformers import PreTrainedModel

from lqer.checkpoint.load import load_quantized
from lqer.errors import ModelError
from lqer.formats import Codebook, Int, MXInt
from lqer.methods import QeraExact, RoundingOnly
from lqer.models.source import load_model, resolve_model
from lqer.models.streaming import open_model
from lqer.models.structure import block_linears, find_blocks
from lqer.models.walker import BlockRun
from lqer.nn.linear import output_error
from lqer.rounding import Gptq, Nearest, Vector
from lqer.rounding.gptq import gptq
from lqer.stages import quantize_in_turn, quantize_sequential
from lqer.stages.gather import CalibrationText
from lqer.stages.quantize import finish_checkpoint
from lqer.stages.quantize_sequential import quantize_in_order
from lqer.statistics import Statistic
from lqer.store.names import block_file, layers_file
from lqer.store.offload import Offload
from lqer.store.store import Workspace
from lqer.transforms import BlockTransform

CPU = torch.device("cpu")
BATCH_SIZE = 2
ATTENTION = {"format": MXInt(bits=8).to_dict(), "axis": "reduction"}


@pytest.fixture(scope="module")
def gptq_plan(plan):
    return replace(plan, method=RoundingOnly(), rank=0, weight=Int(bits=3, block_size=16), rounding=Gptq())


@pytest.fixture(scope="module")
def text(windows_WT) -> CalibrationText:
    return CalibrationText(windows_WT, BATCH_SIZE, 24)


def run(folder, model, tokenizer, text, plan, attention=None, transforms=(), make=Workspace) -> Workspace:
    """A checkpoint in `folder`, quantized with error propagation; the model is left as it is."""
    workspace = make(folder)
    settings = settings_for(model, plan, attention, transforms=transforms)
    quantize_in_order(workspace, resident(model), resident(copy.deepcopy(model)), text, settings)
    finish_checkpoint(workspace, resident(model), tokenizer, settings)
    return workspace


@torch.no_grad()
def inputs_of_block(model: PreTrainedModel, index: int, windows_WT: Tensor) -> dict[str, Tensor]:
    """The inputs, (tokens, in_features), of every linear of one block in the model's own forward pass."""
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    linears = block_linears(find_blocks(model)[1][index])
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].flatten(0, -2)))
        for name, linear in linears.items()
    ]
    for ids_BT in windows_WT.split(BATCH_SIZE):
        model(ids_BT)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(batches) for name, batches in inputs.items()}


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_codes_are_those_of_a_whole_model_whose_weights_are_replaced_block_by_block(
    random_model, letter_tokenizer, text, gptq_plan, run_stages, tmp_path, family
):
    model = random_model(family)
    found = run(tmp_path, model, letter_tokenizer, text, gptq_plan)
    moving = copy.deepcopy(model)
    name, blocks = find_blocks(moving)
    agreeing = []
    for i, block in enumerate(blocks):
        inputs = inputs_of_block(moving, i, text.windows_WT)
        for linear_name, linear in block_linears(block).items():
            x_TI = inputs[linear_name].double()
            expected = gptq(linear.weight.detach(), x_TI.T @ x_TI / len(x_TI), gptq_plan.weight)
            packed = found.tensors(block_file(i))[f"{name}.{i}.{linear_name}.weight.codes"]
            agreeing.append((packed == expected.pack()["codes"]).double().mean())
            linear.weight.data = expected.dequantize()
    # Float32 sums may tip a tie or two.
    assert torch.stack(agreeing).min() > 0.99
    original = run_stages(model, gptq_plan).checkpoint
    last = block_file(len(blocks) - 1)
    differing = [
        (tensor != original.tensors(last)[key]).double().mean()
        for key, tensor in found.tensors(last).items()
        if key.endswith("weight.codes")
    ]
    assert torch.stack(differing).max() > 0.02


def test_codes_of_rounded_inputs_are_those_of_the_inputs_that_the_layer_multiplies(
    random_model, text, gptq_plan, tmp_path
):
    model, activation = random_model("llama"), MXInt(bits=3)
    settings = replace(settings_for(model, replace(gptq_plan, activation=activation)), round_inputs=True)
    workspace = Workspace(tmp_path)
    quantize_in_order(workspace, resident(model), resident(copy.deepcopy(model)), text, settings)
    inputs, block = inputs_of_block(model, 0, text.windows_WT), find_blocks(model)[1][0]
    stored = workspace.tensors(block_file(0))
    for name, linear in block_linears(block).items():
        codes = []
        for x_TI in (activation.fake_quantize(inputs[name]), inputs[name]):
            x_TI = x_TI.double()
            codes.append(gptq(linear.weight.detach(), x_TI.T @ x_TI / len(x_TI), gptq_plan.weight).pack()["codes"])
        of_rounded, of_exact = (
            (stored[f"model.layers.0.{name}.weight.codes"] == expected).double().mean() for expected in codes
        )
        assert of_rounded > 0.99 > of_exact


def test_the_first_block_is_that_of_the_original_stream_and_the_next_ones_are_not(
    random_model, letter_tokenizer, text, gptq_plan, run_stages, tmp_path
):
    model = random_model("llama", num_hidden_layers=3)
    found = run(tmp_path, model, letter_tokenizer, text, gptq_plan)
    original = run_stages(model, gptq_plan).checkpoint
    same = [(found.path / block_file(i)).read_bytes() == (original.path / block_file(i)).read_bytes() for i in range(3)]
    assert same == [True, False, False]
    assert (found.path / layers_file(0)).read_bytes() == (original.path / layers_file(0)).read_bytes()


@pytest.mark.parametrize("attention", [None, ATTENTION], ids=["attention as it is", "quantized attention"])
def test_inputs_are_those_of_the_quantized_model_itself(
    random_model, letter_tokenizer, text, plan, tmp_path, attention
):
    """Activations, low-rank branch and attention as they run once the checkpoint is loaded."""
    plan = replace(plan, weight=MXInt(bits=3), activation=MXInt(bits=6), bias=MXInt(bits=6))
    model = random_model("opt", num_hidden_layers=3)
    found = run(tmp_path, model, letter_tokenizer, text, plan, attention)
    loaded = load_quantized(tmp_path, CPU, verify=False)
    name, blocks = find_blocks(loaded)
    for i in range(3):
        # Up to this block the loaded model is what ran; the block itself was still the original.
        originals = find_blocks(copy.deepcopy(model))[1]
        quantized, blocks[i] = blocks[i], originals[i]
        for module in blocks[i].modules():
            if hasattr(module, "config"):
                module.config = loaded.config
        inputs = inputs_of_block(loaded, i, text.windows_WT)
        blocks[i] = quantized
        for row in found.json(layers_file(i)):
            x_TI = inputs[row["name"].removeprefix(f"{name}.{i}.")]
            sample_SI = x_TI[torch.arange(24) * len(x_TI) // 24]
            weight_OI = model.get_submodule(row["name"]).weight.detach()
            linear = loaded.get_submodule(row["name"])
            error_OI = weight_OI - linear.weight - (linear.low_rank_a @ linear.low_rank_b).T
            share = (sample_SI @ error_OI.T).square().sum() / (sample_SI @ weight_OI.T).square().sum()
            assert row["output_error"] == pytest.approx(float(share), rel=1e-4), row["name"]


@pytest.mark.parametrize("writes", [0, 2, 4, 5, 7, 9, 12])
def test_a_run_killed_at_any_write_resumes_to_the_same_bytes(
    random_model, letter_tokenizer, text, gptq_plan, tmp_path, writes
):
    model = random_model("llama", num_hidden_layers=4)
    whole = run(tmp_path / "whole", model, letter_tokenizer, text, gptq_plan)
    resumed = tmp_path / "resumed"
    with pytest.raises(KilledError):
        run(resumed, model, letter_tokenizer, text, gptq_plan, make=dying_workspace(at_write=writes))
    written = {path: path.stat().st_mtime_ns for path in resumed.glob("block-*")}
    run(resumed, model, letter_tokenizer, text, gptq_plan)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    names = {path.name for path in whole.path.iterdir()} - {"journal.json"}
    assert names == {path.name for path in resumed.iterdir()} - {"journal.json"}
    for name in names:
        assert (resumed / name).read_bytes() == (whole.path / name).read_bytes(), name


@pytest.mark.parametrize("order", ["block", "sequential"])
def test_a_model_read_block_by_block_gives_the_bytes_of_a_whole_one(
    random_model, letter_tokenizer, text, gptq_plan, tmp_path, order
):
    random_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    source = resolve_model(str(tmp_path / "model"))
    settings = replace(settings_for(random_model("llama"), gptq_plan), order=order)
    for kind in ("streamed", "whole"):

        def opened(dtype, kind=kind):
            offload = Offload(0, tmp_path / "offload")
            return (
                open_model(source, dtype, CPU, offload)
                if kind == "streamed"
                else resident(load_model(source, dtype, CPU))
            )

        quantize_in_order(Workspace(tmp_path / kind), opened("auto"), opened(torch.float32), text, settings)
    for name in map(block_file, range(2)):
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # What is not quantized keeps the checkpoint's own dtype, though the run's is another.
    tensors = Workspace(tmp_path / "whole").tensors(block_file(0))
    assert tensors["model.layers.0.input_layernorm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("order", "is_streamed", "held"),
    [
        ("block", True, [0]),
        ("block", False, [7]),
        ("sequential", True, [4, 3, 1, 0, 4, 3, 1]),
        ("sequential", False, [7] * 7),
    ],
)
def test_quantized_linears_take_the_place_of_those_that_were_read_from_disk(
    random_model, text, gptq_plan, tmp_path, monkeypatch, order, is_streamed, held
):
    """Or else a GPU would hold a block twice. Turns are q k v, o, gate up and down; the last block is not run again."""
    model = random_model("llama")
    model.save_pretrained(tmp_path / "model")
    weights: dict[int, list[weakref.ref]] = {}
    alive: list[int] = []
    observe, fill = BlockRun.__init__, quantize_sequential.fill_block

    def noted(run, index, name, block, *rest) -> None:
        observe(run, index, name, block, *rest)
        # Later ones of a block may run a copy.
        weights.setdefault(index, [weakref.ref(linear.weight) for linear in block_linears(block).values()])

    def filled(*arguments) -> None:
        fill(*arguments)
        alive.append(sum(weight() is not None for weight in weights[max(weights)]))

    monkeypatch.setattr(BlockRun, "__init__", noted)
    monkeypatch.setattr(quantize_sequential, "fill_block", filled)
    monkeypatch.setattr(quantize_in_turn, "fill_block", filled)
    source = resolve_model(str(tmp_path / "model"))
    opened = [
        open_model(source, torch.float32, CPU) if is_streamed else resident(copy.deepcopy(model)) for _ in range(2)
    ]
    settings = replace(settings_for(model, gptq_plan), order=order)
    quantize_in_order(Workspace(tmp_path / "run"), *opened, text, settings)
    assert alive == held


def test_the_models_are_left_as_they_were(random_model, letter_tokenizer, text, gptq_plan, tmp_path):
    model = random_model("llama")
    running = copy.deepcopy(model)
    quantize_in_order(Workspace(tmp_path), resident(model), resident(running), text, settings_for(model, gptq_plan))
    for name, tensor in random_model("llama").state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
        assert torch.equal(running.state_dict()[name], tensor), name


def test_a_broken_norm_is_named(random_model, letter_tokenizer, text, gptq_plan, tmp_path):
    model = random_model("llama")
    model.model.layers[0].post_attention_layernorm.weight.data[3] = torch.nan
    with pytest.raises(ModelError, match=r"model\.layers\.0\.post_attention_layernorm\.weight holds NaN"):
        run(tmp_path, model, letter_tokenizer, text, gptq_plan)


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
    run(tmp_path / "recorded", model, letter_tokenizer, text, plan, attention, [recorder])
    run(tmp_path / "plain", model, letter_tokenizer, text, plan, attention)
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
    run(tmp_path, model, letter_tokenizer, text, plan, ATTENTION, transforms)
    quantized = hidden_states(load_quantized(tmp_path, CPU, verify=False), text.windows_WT)
    names = list(block_linears(model.model.layers[0]))
    assert len(rounding.seen) == 3 * len(names)
    for i, layer in enumerate(model.model.layers):
        pairs = dict(zip(names, rounding.seen[i * len(names) :], strict=False))
        normed_TI = layer.input_layernorm(quantized[i][0]).flatten(0, -2)
        torch.testing.assert_close(pairs["self_attn.q_proj"][0], normed_TI, rtol=1e-5, atol=1e-5)
        for name, x_TI in inputs_of_block(model, i, text.windows_WT).items():
            torch.testing.assert_close(pairs[name][1], x_TI, rtol=1e-5, atol=1e-5)


SCALE_I = torch.linspace(0.5, 2, 32)
W2 = MXInt(bits=2)


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
    found = run(tmp_path, model, letter_tokenizer, text, plan, transforms=[ScaleAndRound()])
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
    x_TI = inputs_of_block(model, 0, text.windows_WT)["mlp.gate_proj"] / SCALE_I
    weight_OI = model.model.layers[0].mlp.gate_proj.weight.detach() * SCALE_I
    row = next(row for row in found.json(layers_file(0)) if row["name"].endswith("gate_proj"))
    expected = float(output_error(weight_OI, MXInt(bits=3).fake_quantize(weight_OI), x_TI))
    assert row["output_error_before"] == pytest.approx(expected, rel=1e-4)
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("weight", [Int(bits=3, block_size=16), Codebook(2, 2, group_size=256, block_size=32)])
def test_codes_on_a_gpu_are_those_of_a_cpu(random_model, letter_tokenizer, text, gptq_plan, tmp_path, weight):
    """In float32; other sums may tip a tie, and a codebook that k-means ends with."""
    plan = replace(gptq_plan, weight=weight, rounding=Gptq() if isinstance(weight, Int) else Vector())
    model = random_model("llama")
    run(tmp_path / "cpu", model, letter_tokenizer, text, plan)
    models = (resident(copy.deepcopy(model), "cuda") for _ in range(2))
    quantize_in_order(Workspace(tmp_path / "cuda"), *models, text, settings_for(model, plan))
    rows = {kind: Workspace(tmp_path / kind).json(layers_file(1)) for kind in ("cpu", "cuda")}
    for cpu, cuda in zip(rows["cpu"], rows["cuda"], strict=True):
        assert cuda["output_error"] == pytest.approx(cpu["output_error"], rel=0.1), cpu["name"]
    if isinstance(weight, Int):
        found, expected = (Workspace(tmp_path / kind).tensors(block_file(0)) for kind in ("cuda", "cpu"))
        for name in expected:
            if name.endswith("weight.codes"):
                assert (found[name] == expected[name]).double().mean() > 0.99, name
