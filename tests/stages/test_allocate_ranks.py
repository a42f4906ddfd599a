"""Stage "spectra" and the ranks that follow from it.

Shapes: K = min(I, O) of a linear.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import all_sites, quantize, resident
from killing import KilledError, dying_workspace

from lqer.checkpoint.bits import average_bits
from lqer.errors import ConfigError, ModelError
from lqer.formats import E8P, MXInt
from lqer.methods import LinearPlan, LqerAct, QeraExact
from lqer.models.structure import block_linears, find_blocks
from lqer.rounding import Ldlq
from lqer.stages.allocate_ranks import (
    MeasureSpectra,
    allocate_ranks,
    check_budget,
    error_spectrum,
    measure_spectra,
)
from lqer.stages.calibrate import calibrate
from lqer.stages.gather import CalibrationText, stored_statistics
from lqer.stages.quantize_linears import QuantizeSettings
from lqer.statistics import Hessian
from lqer.store.names import block_file, layers_file
from lqer.store.store import Store, Workspace
from lqer.transforms import Hadamard

CPU = torch.device("cpu")
BLOCKS = 4


@pytest.fixture(scope="module")
def model(random_model):
    return random_model("llama", num_hidden_layers=BLOCKS, hidden_size=64, intermediate_size=96)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def calibration(model, windows_WT, store):
    return gathered(store, 0, model, windows_WT)


def gathered(store, key, model, windows_WT):
    text = CalibrationText(windows_WT, 2, 8)
    return store.obtain("calibrate", key, lambda ws: calibrate(ws, resident(model), text, {Hessian()}))


@pytest.fixture(scope="module")
def plans(model) -> dict[str, LinearPlan | None]:
    """Open ranks, but for a fixed one and a skipped linear; one kind of linear is rounded to fewer bits."""
    plan = LinearPlan(
        method=QeraExact(), weight=MXInt(bits=3), activation=None, bias=None, rank=None,
        factor=MXInt(bits=8, block_size=8), factor_axis="reduction",
    )  # fmt: skip
    name, blocks = find_blocks(model)
    plans: dict[str, LinearPlan | None] = {
        f"{name}.{i}.{linear}": replace(plan, weight=MXInt(bits=2)) if linear.endswith("v_proj") else plan
        for i, block in enumerate(blocks)
        for linear in block_linears(block)
    }
    plans["model.layers.0.mlp.down_proj"] = replace(plan, rank=16)
    plans["model.layers.1.mlp.up_proj"] = None
    return plans


@pytest.fixture(scope="module")
def shapes(model, plans):
    return {name: tuple(model.get_submodule(name).weight.shape) for name in plans}


@pytest.fixture(scope="module")
def spectra(model, store, calibration, plans):
    return store.obtain(
        "spectra", 0, lambda ws: measure_spectra(ws, resident(model), stored_statistics(calibration), plans)
    )


def test_energies_are_the_squared_singular_values_of_the_weighted_error(model, calibration, spectra, plans):
    sites = all_sites(calibration)
    for name in ("model.layers.2.self_attn.k_proj", "model.layers.0.mlp.down_proj", "model.layers.3.mlp.up_proj"):
        index = int(name.split(".")[2])
        weight_OI = model.get_submodule(name).weight.detach().double()
        r_II = calibration.tensors(block_file(index))[f"{sites[name]}.hessian"].double()
        r_II = r_II / r_II.diagonal().mean()
        eigenvalues_I, vectors_II = torch.linalg.eigh(r_II)
        root_II = vectors_II * eigenvalues_I.clamp(min=0).sqrt() @ vectors_II.T
        error_OI = weight_OI - MXInt(bits=3).quantize(weight_OI.float()).dequantize().double()
        found = spectra.tensors(block_file(index))
        energies_K = torch.linalg.svdvals(root_II @ error_OI.T).square()
        torch.testing.assert_close(found[f"{name}.energies"], energies_K, rtol=1e-4, atol=1e-6 * float(energies_K[0]))
        assert float(found[f"{name}.weight_energy"]) == pytest.approx(
            float((weight_OI @ r_II * weight_OI).sum()), rel=1e-5
        )
    assert not any(key.startswith("model.layers.1.mlp.up_proj.") for key in spectra.tensors(block_file(1)))


def test_a_killed_pass_resumes_after_the_last_block(model, calibration, spectra, plans, tmp_path):
    with pytest.raises(KilledError):
        measure_spectra(
            dying_workspace(block_file(2))(tmp_path), resident(model), stored_statistics(calibration), plans
        )
    written = (tmp_path / block_file(1)).stat().st_mtime_ns
    measure_spectra(Workspace(tmp_path), resident(model), stored_statistics(calibration), plans)
    assert (tmp_path / block_file(1)).stat().st_mtime_ns == written
    for i in range(BLOCKS):
        assert (tmp_path / block_file(i)).read_bytes() == (spectra.path / block_file(i)).read_bytes()


def quantized_rows(model, letter_tokenizer, calibration, plans, folder):
    workspace = Workspace(folder)
    quantize(
        workspace, resident(model), letter_tokenizer, stored_statistics(calibration), QuantizeSettings(plans, None, 0)
    )
    return [row for i in range(BLOCKS) for row in workspace.json(layers_file(i))]


@pytest.mark.parametrize("budget_bits", [4.5, 6.0, 7.25])
def test_the_models_bits_meet_the_budget_from_below(
    model, letter_tokenizer, calibration, spectra, plans, shapes, tmp_path, budget_bits
):
    budget = allocate_ranks(plans, spectra, BLOCKS, shapes, budget_bits)
    rows = quantized_rows(model, letter_tokenizer, calibration, budget.plans, tmp_path)
    average = average_bits(rows)["average"]
    assert average == pytest.approx(budget.average_bits, abs=1e-12)
    # A step of the smallest linear of this tiny model is far more than a hundredth of a bit.
    smallest_step = 8 * (64 + 32) * 9 / sum(row["out_features"] * row["in_features"] for row in rows)
    assert budget_bits - smallest_step < average <= budget_bits
    ranks = {row["name"]: row["rank"] for row in rows}
    assert ranks["model.layers.0.mlp.down_proj"] == 16
    assert "model.layers.1.mlp.up_proj" not in ranks
    assert all(rank % 8 == 0 for rank in ranks.values())
    assert all(ranks[name] == rank for name, rank in budget.allocation.ranks.items())


def test_the_objective_is_what_the_quantized_layers_leave(
    model, letter_tokenizer, calibration, spectra, plans, shapes, tmp_path
):
    """Summed from the solver's own captured energies, and no more than at the uniform rank."""
    budget = allocate_ranks(plans, spectra, BLOCKS, shapes, 6.0)
    rows = {row["name"]: row for row in quantized_rows(model, letter_tokenizer, calibration, budget.plans, tmp_path)}
    left = 0.0
    for name in budget.allocation.ranks:
        tensors = spectra.tensors(block_file(int(name.split(".")[2])))
        missed = 1 - (rows[name]["captured_energy"] or 0.0)
        left += missed * float(tensors[f"{name}.energies"].sum() / tensors[f"{name}.weight_energy"])
    assert left == pytest.approx(budget.allocation.objective, rel=1e-6)
    assert budget.allocation.objective < 0.95 * budget.allocation.uniform_objective
    assert budget.uniform_average_bits <= 6.0


def test_the_kind_of_linear_with_the_larger_errors_gets_the_larger_ranks(spectra, plans, shapes):
    ranks = allocate_ranks(plans, spectra, BLOCKS, shapes, 6.0).allocation.ranks
    of = {kind: [rank for name, rank in ranks.items() if name.endswith(kind)] for kind in ("v_proj", "k_proj")}
    assert sum(of["v_proj"]) > sum(of["k_proj"])


def test_a_budget_below_the_weights_alone_is_refused(spectra, plans, shapes):
    with pytest.raises(
        ConfigError, match=r"budget_bits: must be at least 3\.\d+, the bits of the weights .* alone; found 3.2"
    ):
        allocate_ranks(plans, spectra, BLOCKS, shapes, 3.2)
    with pytest.raises(ConfigError, match=r"must be at least 3\.\d+, .*found 3\.2"):
        check_budget(plans, shapes, 3.2)
    check_budget(plans, shapes, 3.5)


def test_the_spectra_depend_on_the_rounding_and_the_metric_and_not_on_the_factors(plans):
    name = "model.layers.0.self_attn.q_proj"

    def key(**changes):
        # Another stage counts by its own key.
        calibration = SimpleNamespace(model="model", device=CPU, identity="calibrate-0")
        return MeasureSpectra.of(calibration, {**plans, name: replace(plans[name], **changes)}).key

    assert key(factor=MXInt(bits=6)) == key(rank=8) == key(solver="exact") == key()
    assert key(method=LqerAct()) != key()
    assert key(weight=MXInt(bits=4)) != key()
    assert key(seed=6) != key()


def test_a_spectrum_is_that_of_the_error_in_the_basis_of_the_plan():
    generator = torch.Generator().manual_seed(0)
    weight_OI, x_TI = torch.randn(48, 96, generator=generator), torch.randn(300, 96, generator=generator)
    statistics = {"hessian": x_TI.T @ x_TI / 300}
    plan = LinearPlan(
        QeraExact(), E8P(2), None, None, 0, MXInt(8), "outer", rounding=Ldlq(), transform=Hadamard(), seed=5
    )
    spectrum = error_spectrum(weight_OI, statistics, plan)
    rounded = plan.quantize(weight_OI, statistics)
    error_OI = (weight_OI - rounded.effective_weight()).double()
    hessian_II = statistics["hessian"].double()
    unit = hessian_II.diagonal().mean()
    left = float((error_OI @ hessian_II * error_OI).sum() / unit)
    assert float(spectrum["energies"].sum()) == pytest.approx(left, rel=1e-4)
    assert int(spectrum["weight_bits"]) == rounded.weight_OI.code_bits + rounded.metadata_bits


def test_a_broken_weight_is_named(random_model, windows_WT, plans, tmp_path, store):
    model = random_model("llama")
    plans = {key: plan for key, plan in plans.items() if int(key.split(".")[2]) < len(model.model.layers)}
    calibration = gathered(store, "broken", model, windows_WT)
    model.model.layers[1].mlp.gate_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.gate_proj: 1 NaN"):
        measure_spectra(Workspace(tmp_path), resident(model), stored_statistics(calibration), plans)
