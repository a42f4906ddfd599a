"""Stage "spectra": the errors of rounding under the metrics of the methods.

Shapes: K = min(I, O) of a linear.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import all_sites
from killing import KilledError, dying_workspace
from measured_spectra import BLOCKS, SIZES, SKIPPED, MeasuredSpectra

from lqer.errors import ModelError
from lqer.formats import E8P, MXInt
from lqer.methods import LinearPlan, LqerAct, QeraExact
from lqer.rounding import Gptq, Ldlq
from lqer.stages.measure_spectra import MeasureSpectra, error_spectrum
from lqer.store.names import block_file
from lqer.store.store import Artifact, Workspace
from lqer.transforms import Hadamard

CPU = torch.device("cpu")


def test_energies_are_the_squared_singular_values_of_the_weighted_error(measured_spectra):
    sites, found = all_sites(measured_spectra.calibration), measured_spectra.tensors
    for name in ("model.layers.2.self_attn.k_proj", "model.layers.0.mlp.down_proj", "model.layers.3.mlp.up_proj"):
        index = int(name.split(".")[2])
        weight_OI = measured_spectra.model.get_submodule(name).weight.detach().double()
        statistics = measured_spectra.calibration.tensors(block_file(index))
        r_II = statistics[f"{sites[name]}.hessian"].double()
        r_II = r_II / r_II.diagonal().mean()
        eigenvalues_I, vectors_II = torch.linalg.eigh(r_II)
        root_II = vectors_II * eigenvalues_I.clamp(min=0).sqrt() @ vectors_II.T
        error_OI = weight_OI - MXInt(bits=3).quantize(weight_OI.float()).dequantize().double()
        energies_K = torch.linalg.svdvals(root_II @ error_OI.T).square()
        torch.testing.assert_close(found[f"{name}.energies"], energies_K, rtol=1e-4, atol=1e-6 * float(energies_K[0]))
        assert float(found[f"{name}.weight_energy"]) == pytest.approx(
            float((weight_OI @ r_II * weight_OI).sum()), rel=1e-5
        )
    assert not any(key.startswith(f"{SKIPPED}.") for key in found)


def test_a_killed_pass_resumes_after_the_last_block(measured_spectra, tmp_path):
    with pytest.raises(KilledError):
        measured_spectra.measure(dying_workspace(block_file(2))(tmp_path))
    written = (tmp_path / block_file(1)).stat().st_mtime_ns
    measured_spectra.measure(Workspace(tmp_path))
    assert (tmp_path / block_file(1)).stat().st_mtime_ns == written
    for i in range(BLOCKS):
        assert (tmp_path / block_file(i)).read_bytes() == (measured_spectra.artifact.path / block_file(i)).read_bytes()


def test_the_spectra_depend_on_the_rounding_and_the_metric_and_not_on_the_factors(measured_spectra):
    name, plans = "model.layers.0.self_attn.q_proj", measured_spectra.plans

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


def test_a_broken_weight_is_named(random_model, windows_WT, tmp_path):
    model = random_model("llama", **{**SIZES, "num_hidden_layers": 2})
    broken = MeasuredSpectra.of(model, windows_WT, tmp_path / "store")
    model.model.layers[1].mlp.gate_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.gate_proj: 1 NaN"):
        broken.measure(Workspace(tmp_path / "spectra"))


class Indefinite(Artifact):
    """A calibration with a Hessian that no rounding can factor."""

    def tensors(self, name):
        return {key: -value if key.endswith(".hessian") else value for key, value in super().tensors(name).items()}


def test_a_linear_whose_hessian_is_broken_is_named(measured_spectra, tmp_path):
    calibration = Indefinite(measured_spectra.calibration.path)
    plans = {name: plan and replace(plan, rounding=Gptq()) for name, plan in measured_spectra.plans.items()}
    broken = replace(measured_spectra, calibration=calibration, plans=plans)
    with pytest.raises(ModelError, match=r"^model\.layers\.0\.self_attn\.[qkv]_proj: the hessian has the negative"):
        broken.measure(Workspace(tmp_path))
