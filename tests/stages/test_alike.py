"""Experts that are quantized at once: which they are, and that each is quantized as if alone."""

from __future__ import annotations

import pytest
import torch
from helpers import resident, settings_for
from mixtures import random_mixture

from lqer.errors import ModelError
from lqer.formats import Int, MXInt, Trellis
from lqer.methods import METHODS, LinearPlan
from lqer.models.structure import block_linears, prepare_model
from lqer.models.walker import walk_blocks
from lqer.rounding import Gptq
from lqer.rounding.ldlq import Ldlq
from lqer.stages import alike
from lqer.stages.alike import batches_of
from lqer.stages.block_work import BlockWork, all_spectra, weight_shapes
from lqer.stages.gather import CalibrationText, observe_block
from lqer.stages.quantize_linears import quantize_linears
from lqer.statistics import Hessian
from lqer.transforms import Hadamard

EXPERTS = "model.layers.0.mlp.experts"
CPU = torch.device("cpu")
PLANS = [
    LinearPlan(METHODS["lqer-act"](), MXInt(3), rank=4),
    LinearPlan(METHODS["gptq"](), Int(3, 16), rounding=Gptq()),
    LinearPlan(METHODS["none"](), Trellis(2), rounding=Ldlq(), transform=Hadamard()),
]


@pytest.fixture(scope="module")
def model():
    model = random_mixture("qwen3_moe", num_hidden_layers=1)
    prepare_model(model)
    return model


@pytest.fixture(scope="module")
def statistics(model, windows_WT):
    run = next(walk_blocks(resident(model), windows_WT, 2))
    return observe_block(run, None, CalibrationText(windows_WT, 2, 24), {Hessian()})


def quantized(model, statistics, plan):
    block = model.model.layers[0]
    work = BlockWork(0, "model.layers.0", weight_shapes(block), block.state_dict(), with_spectra=True)
    return quantize_linears(work, work.linears, statistics, settings_for(model, plan), CPU)


@pytest.mark.parametrize("plan", PLANS, ids=["lqer-act", "gptq", "trellis"])
def test_experts_are_quantized_together_as_each_alone(monkeypatch, model, statistics, plan):
    together = quantized(model, statistics, plan)
    monkeypatch.setitem(alike.BATCH_BYTES, "cpu", 0)
    alone = quantized(model, statistics, plan)
    assert together.tensors.keys() == alone.tensors.keys()
    assert all_spectra(together.spectra).keys() == all_spectra(alone.spectra).keys()
    assert together.replaced == alone.replaced
    for row, other in zip(together.rows, alone.rows, strict=True):
        # Sums in another order: a weight between two codes may become either.
        assert row["output_error"] == pytest.approx(other["output_error"], rel=2e-2)
        assert {key: row[key] for key in row if "error" not in key and "energy" not in key} == {
            key: other[key] for key in other if "error" not in key and "energy" not in key
        }


def batches(model, statistics, plans):
    name, shapes = "model.layers.0", {}
    for linear, module in block_linears(model.model.layers[0]).items():
        shapes[f"{name}.{linear}"] = module.weight.shape
    return batches_of(list(shapes), statistics, plans, shapes, CPU)


def test_a_batch_are_linears_of_one_layers_experts_of_one_shape_and_plan(model, statistics):
    plans = dict(settings_for(model, PLANS[1]).plans)
    plans[f"{EXPERTS}.2.up_proj"] = PLANS[0]
    found = batches(model, statistics, plans)
    several = [batch for batch in found if len(batch) > 1]
    halves = [f"{EXPERTS}.{index}.{half}_proj" for index in range(4) for half in ("gate", "up")]
    halves.remove(f"{EXPERTS}.2.up_proj")
    assert several == [halves, [f"{EXPERTS}.{index}.down_proj" for index in range(4)]]
    assert sorted(name for batch in found for name in batch) == sorted(plans)


def test_batches_hold_at_most_so_many_bytes_and_whole_sites(monkeypatch, model, statistics):
    plans = settings_for(model, PLANS[1]).plans
    rows, columns = model.get_submodule(f"{EXPERTS}.0.gate_proj").weight.shape
    of_site = columns * (alike.HESSIAN_BYTES * columns + alike.WEIGHT_BYTES * rows * 2)
    monkeypatch.setitem(alike.BATCH_BYTES, "cpu", 3 * of_site)
    halves = [batch for batch in batches(model, statistics, plans) if batch[0].endswith("gate_proj")]
    assert [len(batch) for batch in halves] == [6, 2]


def test_an_alternation_is_one_linears_own(model, statistics):
    plan = LinearPlan(METHODS["loftq"](), MXInt(3), rank=4, iterations=2)
    assert all(len(batch) == 1 for batch in batches(model, statistics, settings_for(model, plan).plans))


def test_of_experts_that_are_quantized_together_a_weight_that_is_not_finite_is_named(model, statistics):
    weight_OI = model.get_submodule(f"{EXPERTS}.1.down_proj").weight
    kept = weight_OI.detach().clone()
    weight_OI.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=rf"^{EXPERTS}.1.down_proj: 1 NaN"):
        quantized(model, statistics, PLANS[1])
    weight_OI.data.copy_(kept)
