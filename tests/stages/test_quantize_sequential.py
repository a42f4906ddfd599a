"""Error propagation against a whole model in memory whose weights are replaced block by block.

Shapes: I in_features, O out_features, T tokens of the whole text, W windows, D hidden size.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import inputs_of_linears, quantize_in_memory, resident, settings_for
from killing import KilledError, dying_workspace

from lqer.checkpoint.load import load_quantized
from lqer.errors import ModelError
from lqer.formats import Codebook, Int, MXInt
from lqer.models.source import load_model, resolve_model
from lqer.models.streaming import open_model
from lqer.models.structure import block_linears, find_blocks
from lqer.models.walker import BlockRun
from lqer.rounding import Gptq, Vector
from lqer.rounding.gptq import gptq
from lqer.rounding.hessian import damp
from lqer.stages import quantize_in_turn, quantize_sequential
from lqer.stages.quantize_sequential import quantize_in_order
from lqer.store.names import block_file, layers_file
from lqer.store.offload import Offload
from lqer.store.store import Workspace

CPU = torch.device("cpu")
BATCH_SIZE = 2
ATTENTION = {"format": MXInt(bits=8).to_dict(), "axis": "reduction"}


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_codes_are_those_of_a_whole_model_whose_weights_are_replaced_block_by_block(
    random_model, letter_tokenizer, text, gptq_plan, run_stages, tmp_path, family
):
    model = random_model(family)
    found = quantize_in_memory(tmp_path, model, letter_tokenizer, text, settings_for(model, gptq_plan))
    moving = copy.deepcopy(model)
    name, blocks = find_blocks(moving)
    agreeing = []
    for i, block in enumerate(blocks):
        inputs = inputs_of_linears(moving, text.windows_WT, BATCH_SIZE)
        for linear_name, linear in block_linears(block).items():
            x_TI = torch.cat(inputs[f"{name}.{i}.{linear_name}"]).double()
            expected = gptq(linear.weight.detach(), damp(x_TI.T @ x_TI / len(x_TI)), gptq_plan.weight)
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
    inputs, block = inputs_of_linears(model, text.windows_WT, BATCH_SIZE), find_blocks(model)[1][0]
    stored = workspace.tensors(block_file(0))
    for name, linear in block_linears(block).items():
        codes, exact_TI = [], torch.cat(inputs[f"model.layers.0.{name}"])
        for x_TI in (activation.fake_quantize(exact_TI).double(), exact_TI.double()):
            damped = damp(x_TI.T @ x_TI / len(x_TI))
            codes.append(gptq(linear.weight.detach(), damped, gptq_plan.weight).pack()["codes"])
        of_rounded, of_exact = (
            (stored[f"model.layers.0.{name}.weight.codes"] == expected).double().mean() for expected in codes
        )
        assert of_rounded > 0.99 > of_exact


def test_the_first_block_is_that_of_the_original_stream_and_the_next_ones_are_not(
    random_model, letter_tokenizer, text, gptq_plan, run_stages, tmp_path
):
    model = random_model("llama", num_hidden_layers=3)
    found = quantize_in_memory(tmp_path, model, letter_tokenizer, text, settings_for(model, gptq_plan))
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
    found = quantize_in_memory(tmp_path, model, letter_tokenizer, text, settings_for(model, plan, attention))
    loaded = load_quantized(tmp_path, CPU, verify=False)
    _, blocks = find_blocks(loaded)
    for i in range(3):
        # Up to this block the loaded model is what ran; the block itself was still the original.
        originals = find_blocks(copy.deepcopy(model))[1]
        quantized, blocks[i] = blocks[i], originals[i]
        for module in blocks[i].modules():
            if hasattr(module, "config"):
                module.config = loaded.config
        inputs = inputs_of_linears(loaded, text.windows_WT, BATCH_SIZE)
        blocks[i] = quantized
        for row in found.json(layers_file(i)):
            x_TI = torch.cat(inputs[row["name"]])
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
    settings = settings_for(model, gptq_plan)
    whole = quantize_in_memory(tmp_path / "whole", model, letter_tokenizer, text, settings)
    resumed = tmp_path / "resumed"
    with pytest.raises(KilledError):
        quantize_in_memory(resumed, model, letter_tokenizer, text, settings, dying_workspace(at_write=writes))
    written = {path: path.stat().st_mtime_ns for path in resumed.glob("block-*")}
    quantize_in_memory(resumed, model, letter_tokenizer, text, settings)
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
    settings = settings_for(random_model("llama"), gptq_plan, order=order)
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
    settings = settings_for(model, gptq_plan, order=order)
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
        quantize_in_memory(tmp_path, model, letter_tokenizer, text, settings_for(model, gptq_plan))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("weight", [Int(bits=3, block_size=16), Codebook(2, 2, group_size=256, block_size=32)])
def test_codes_on_a_gpu_are_those_of_a_cpu(random_model, letter_tokenizer, text, gptq_plan, tmp_path, weight):
    """In float32; other sums may tip a tie, and a codebook that k-means ends with."""
    plan = replace(gptq_plan, weight=weight, rounding=Gptq() if isinstance(weight, Int) else Vector())
    model = random_model("llama")
    quantize_in_memory(tmp_path / "cpu", model, letter_tokenizer, text, settings_for(model, plan))
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
