"""The quantized stream against a whole model in memory whose weights are replaced block by block.

Shapes: I in_features, O out_features, T tokens of the whole text, W windows, D hidden size.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lqer.checkpoint.load import load_quantized
from lqer.errors import ModelError
from lqer.formats import Codebook, Int, MXInt
from lqer.models.loaders import OpenedModel
from lqer.models.source import load_model, resolve_model
from lqer.models.streaming import open_model
from lqer.models.structure import block_linears, find_blocks
from lqer.rounding import Gptq, Vector
from lqer.rounding.gptq import gptq
from lqer.stages import quantize_sequential
from lqer.stages.calibrate import CalibrationText, observe_block
from lqer.stages.quantize import QuantizeSettings, finish_checkpoint, quantization_key
from lqer.stages.quantize_sequential import BlockChange, BlockTask, quantize_in_order, stream_key
from lqer.store.names import block_file, layers_file
from lqer.store.offload import Offload
from lqer.store.store import Workspace

CPU = torch.device("cpu")
BATCH_SIZE = 2
ATTENTION = {"format": MXInt(bits=8).to_dict(), "blocks": "reduction"}


@pytest.fixture(scope="module")
def gptq_plan(plan):
    return replace(plan, method="none", rank=0, weight=Int(bits=3, block_size=16), rounding=Gptq())


@pytest.fixture(scope="module")
def text(windows_WT) -> CalibrationText:
    return CalibrationText(windows_WT, BATCH_SIZE, 24)


def held(model: PreTrainedModel) -> OpenedModel:
    return OpenedModel.resident(model, CPU, Offload())


def settings_for(model: PreTrainedModel, plan, attention=None) -> QuantizeSettings:
    name, blocks = find_blocks(model)
    plans = {f"{name}.{i}.{linear}": plan for i, block in enumerate(blocks) for linear in block_linears(block)}
    return QuantizeSettings(plans, attention, seed=0)


def run(folder, model, tokenizer, text, plan, attention=None, step=None, make=Workspace) -> Workspace:
    """A checkpoint in `folder`, made on the quantized stream; the model is left as it is."""
    workspace = make(folder)
    settings = settings_for(model, plan, attention)
    quantize_in_order(workspace, held(model), held(copy.deepcopy(model)), text, settings, step)
    finish_checkpoint(workspace, held(model), tokenizer, settings)
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
    loaded = load_quantized(tmp_path, CPU)
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


class KilledError(Exception):
    pass


def dying_at(writes: int):
    """A workspace class whose process dies at the write of that number."""

    class Dying(Workspace):
        count = 0

        def write(self, name, write):
            if Dying.count == writes:
                raise KilledError
            Dying.count += 1
            super().write(name, write)

    return Dying


@pytest.mark.parametrize("writes", [0, 2, 4, 5, 7, 9, 12])
def test_a_run_killed_at_any_write_goes_on_to_the_same_bytes(
    random_model, letter_tokenizer, text, gptq_plan, tmp_path, writes
):
    model = random_model("llama", num_hidden_layers=4)
    whole = run(tmp_path / "whole", model, letter_tokenizer, text, gptq_plan)
    resumed = tmp_path / "resumed"
    with pytest.raises(KilledError):
        run(resumed, model, letter_tokenizer, text, gptq_plan, make=dying_at(writes))
    written = {path: path.stat().st_mtime_ns for path in resumed.glob("block-*")}
    run(resumed, model, letter_tokenizer, text, gptq_plan)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    names = {path.name for path in whole.path.iterdir()} - {"journal.json"}
    assert names == {path.name for path in resumed.iterdir()} - {"journal.json"}
    for name in names:
        assert (resumed / name).read_bytes() == (whole.path / name).read_bytes(), name


def test_a_model_read_block_by_block_gives_the_bytes_of_a_whole_one(
    random_model, letter_tokenizer, text, gptq_plan, tmp_path
):
    random_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    source = resolve_model(str(tmp_path / "model"))
    settings = settings_for(random_model("llama"), gptq_plan)
    for kind in ("streamed", "whole"):

        def opened(dtype, kind=kind):
            offload = Offload(0, tmp_path / "offload")
            return (
                open_model(source, dtype, CPU, offload) if kind == "streamed" else held(load_model(source, dtype, CPU))
            )

        quantize_in_order(Workspace(tmp_path / kind), opened("auto"), opened(torch.float32), text, settings)
    for name in map(block_file, range(2)):
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # What is not quantized keeps the checkpoint's own dtype, though the run's is another.
    tensors = Workspace(tmp_path / "whole").tensors(block_file(0))
    assert tensors["model.layers.0.input_layernorm.weight"].dtype == torch.bfloat16


def test_the_models_are_left_as_they_were(random_model, letter_tokenizer, text, gptq_plan, tmp_path):
    model = random_model("llama")
    running = copy.deepcopy(model)
    quantize_in_order(Workspace(tmp_path), held(model), held(running), text, settings_for(model, gptq_plan))
    for name, tensor in random_model("llama").state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
        assert torch.equal(running.state_dict()[name], tensor), name


def test_a_broken_input_is_named(random_model, letter_tokenizer, text, gptq_plan, tmp_path):
    model = random_model("llama")
    model.model.layers[0].post_attention_layernorm.weight.data[3] = torch.nan
    with pytest.raises(ModelError, match=r"inputs of model\.layers\.0\.mlp\.gate_proj hold NaN or infinities"):
        run(tmp_path, model, letter_tokenizer, text, gptq_plan)


def test_the_key_says_that_the_stream_is_quantized_and_on_which_text(random_model, text, gptq_plan):
    settings = settings_for(random_model("llama"), gptq_plan)

    def key(text=text, dtype=torch.float32, settings=settings):
        return quantization_key(stream_key("model", text, dtype, CPU, settings), "model", settings, CPU)

    others = [
        key(replace(text, windows_WT=text.windows_WT + 1)),
        key(replace(text, batch_size=1)),
        key(dtype=torch.bfloat16),
        key(settings=replace(settings, seed=1)),
        quantization_key("calibration", "model", settings, CPU),
    ]
    assert key() not in others
    assert key() == key()


class Seen:
    """A block step that changes nothing and keeps what it was given."""

    def __init__(self):
        self.inputs: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def __call__(self, task: BlockTask) -> BlockChange:
        self.inputs.append(task.inputs_WTD.clone())
        self.targets.append(task.targets_WTD.clone())
        with torch.no_grad():
            self.outputs.append(task.function({}, task.inputs_WTD[1:4]))
        return BlockChange()


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
def test_a_block_step_sees_inputs_of_the_quantized_and_targets_of_the_original_model(
    random_model, letter_tokenizer, text, plan, tmp_path, attention
):
    model = random_model("gemma3")
    seen = Seen()
    plan = replace(plan, weight=MXInt(bits=3))
    run(tmp_path / "stepped", model, letter_tokenizer, text, plan, attention, seen)
    run(tmp_path / "plain", model, letter_tokenizer, text, plan, attention)
    quantized = hidden_states(load_quantized(tmp_path / "stepped", CPU), text.windows_WT)
    original = hidden_states(model, text.windows_WT)
    for i in range(3):
        torch.testing.assert_close(seen.inputs[i], quantized[i][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen.targets[i], original[i][1], rtol=1e-5, atol=1e-5)
        # A step that changes nothing changes nothing.
        name = block_file(i)
        assert (tmp_path / "stepped" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    if attention is None:
        torch.testing.assert_close(seen.outputs[0], original[0][1][1:4], rtol=1e-5, atol=1e-5)
    assert not torch.equal(seen.inputs[1], original[1][0])


def test_what_a_block_step_makes_is_stored_and_runs(random_model, letter_tokenizer, text, plan, tmp_path, monkeypatch):
    """It scales the inputs of gate and up, folds that into their norm, and rounds down_proj."""
    plan = replace(plan, method="qera-exact", weight=MXInt(bits=3))
    model = random_model("llama")
    w2 = MXInt(bits=2)

    def scale_and_round(task: BlockTask) -> BlockChange:
        scale_I = torch.linspace(0.5, 2, 32)
        parameters = {
            f"mlp.{name}.weight": task.block.get_parameter(f"mlp.{name}.weight").detach() * scale_I
            for name in ("gate_proj", "up_proj")
        }
        norm_I = task.block.get_parameter("post_attention_layernorm.weight").detach() / scale_I
        rounded = {"mlp.down_proj": w2.quantize(task.block.get_parameter("mlp.down_proj.weight"))}
        return BlockChange({**parameters, "post_attention_layernorm.weight": norm_I}, rounded)

    seen = []

    def observe(visit, run, text, requested):
        statistics = observe_block(visit, run, text, requested)
        seen.append(statistics.of(f"{visit.name}.mlp.gate_proj")["mean_square"])
        return statistics

    monkeypatch.setattr(quantize_sequential, "observe_block", observe)
    run(tmp_path, model, letter_tokenizer, text, plan, step=scale_and_round)
    loaded = load_quantized(tmp_path, CPU)
    for i, layer in enumerate(model.model.layers):
        mlp = loaded.model.layers[i].mlp
        assert torch.equal(mlp.down_proj.weight, w2.fake_quantize(layer.mlp.down_proj.weight.detach()))
        assert mlp.down_proj.low_rank_a is not None
        scale_I = torch.linspace(0.5, 2, 32)
        norm_I = loaded.model.layers[i].post_attention_layernorm.weight
        torch.testing.assert_close(norm_I.data, layer.post_attention_layernorm.weight.detach() / scale_I)
        rounded_OI = MXInt(bits=3).fake_quantize(layer.mlp.gate_proj.weight.detach() * scale_I)
        assert torch.equal(mlp.gate_proj.weight, rounded_OI)
    # Statistics are those of what the step left.
    unscaled = inputs_of_block(model, 0, text.windows_WT)["mlp.gate_proj"].square().mean(0)
    torch.testing.assert_close(seen[0], unscaled / torch.linspace(0.5, 2, 32).square(), rtol=1e-4, atol=1e-6)
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("weight", [Int(bits=3, block_size=16), Codebook(2, 2, group_size=256, block_size=32)])
def test_codes_on_a_gpu_are_those_of_a_cpu(random_model, letter_tokenizer, text, gptq_plan, tmp_path, weight):
    """In float32; other sums may tip a tie, and a codebook that k-means ends with."""
    plan = replace(gptq_plan, weight=weight, rounding=Gptq() if isinstance(weight, Int) else Vector())
    model = random_model("llama")
    run(tmp_path / "cpu", model, letter_tokenizer, text, plan)
    gpu = torch.device("cuda")
    models = (OpenedModel.resident(copy.deepcopy(model), gpu, Offload()) for _ in range(2))
    quantize_in_order(Workspace(tmp_path / "cuda"), *models, text, settings_for(model, plan))
    rows = {kind: Workspace(tmp_path / kind).json(layers_file(1)) for kind in ("cpu", "cuda")}
    for cpu, cuda in zip(rows["cpu"], rows["cuda"], strict=True):
        assert cuda["output_error"] == pytest.approx(cpu["output_error"], rel=0.1), cpu["name"]
    if isinstance(weight, Int):
        found, expected = (Workspace(tmp_path / kind).tensors(block_file(0)) for kind in ("cuda", "cpu"))
        for name in expected:
            if name.endswith("weight.codes"):
                assert (found[name] == expected[name]).double().mean() > 0.99, name
