"""Stage "quantize": what it writes beside the checkpoint, how it goes on, what it refuses.

Shapes: I in_features, O out_features, S sampled tokens.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import all_sites, quantize, resident, settings_for
from killing import KilledError, dying_workspace
from torch import Tensor, nn
from transformers import PreTrainedModel

from lqer.errors import ModelError
from lqer.formats import Int, MXInt
from lqer.methods import LinearPlan, QeraExact
from lqer.rounding import Gptq
from lqer.rounding.hessian import DampedHessian
from lqer.stages import gather, layer_rows
from lqer.stages.block_work import BlockWork, blocks_with_spectra, bytes_of_later_spectra
from lqer.stages.calibrate import calibrate
from lqer.stages.gather import CalibrationText, stored_statistics
from lqer.stages.layer_rows import later_spectra
from lqer.stages.quantize import ends_in_between, quantize_blocks
from lqer.statistics import Hessian
from lqer.store.names import block_file, layers_file, spectra_file
from lqer.store.store import Artifact, Workspace

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plan(plan):
    return replace(plan, weight=MXInt(bits=3))


@pytest.fixture(scope="module")
def quantized(random_model, run_stages, plan):
    """A Llama of four blocks, at 3 bits."""
    return run_stages(random_model("llama", num_hidden_layers=4), plan)


def run_quantize(workspace: Workspace, model: PreTrainedModel, tokenizer, calibration: Artifact, plan) -> Workspace:
    quantize(workspace, resident(model), tokenizer, stored_statistics(calibration), settings_for(model, plan))
    return workspace


def effective_weight(stages, block: int, name: str) -> Tensor:
    """W_q and W_q + (A·B)ᵀ of a quantized Llama, decoded here from the packed bytes."""
    tensors = stages.checkpoint.tensors(block_file(block))
    entry = stages.details["linears"][name]

    def decode(role: str) -> Tensor:
        shape, axis, bits = entry[role]["shape"], entry[role]["axis"], entry[role]["format"]["bits"]
        rows, length = shape[1 - axis], shape[axis]
        stream = tensors[f"{name}.{role}.codes"].reshape(rows, -1).long()
        ones = (stream[:, :, None] >> torch.arange(8)) & 1
        codes = (ones.reshape(rows, -1)[:, : length * bits].reshape(rows, length, bits) << torch.arange(bits)).sum(-1)
        exponents = tensors[f"{name}.{role}.exponents"].reshape(rows, -1).repeat_interleave(16, 1)[:, :length]
        values = (codes - 2 ** (bits - 1)) * 2.0 ** (exponents.double() - 127 - (bits - 1))
        return values if axis == 1 else values.T

    return decode("weight"), decode("weight") + (decode("low_rank_a") @ decode("low_rank_b")).T


def test_rows_hold_the_errors_of_the_stored_weights(quantized):
    sites = all_sites(quantized.calibration)
    for block in range(4):
        statistics = quantized.calibration.tensors(block_file(block))
        for row in quantized.checkpoint.json(layers_file(block)):
            weight_OI = quantized.model.get_submodule(row["name"]).weight.detach().double()
            sample_SI = statistics[f"{sites[row['name']]}.sample"].double()
            rounded_OI, effective_OI = effective_weight(quantized, block, row["name"])
            for key, stored_OI in (("_before", rounded_OI), ("", effective_OI)):
                error_OI = weight_OI - stored_OI
                assert row[f"weight_error{key}"] == pytest.approx(float(error_OI.norm() / weight_OI.norm()), rel=1e-5)
                share = (sample_SI @ error_OI.T).square().sum() / (sample_SI @ weight_OI.T).square().sum()
                assert row[f"output_error{key}"] == pytest.approx(float(share), rel=1e-5)
            assert row["weight_error"] < row["weight_error_before"]
            assert (row["out_features"], row["in_features"], row["rank"]) == (*weight_OI.shape, 8)


def test_every_linear_has_one_row_in_the_order_of_the_model(quantized):
    names = [row["name"] for block in range(4) for row in quantized.checkpoint.json(layers_file(block))]
    assert names == [
        name for name, module in quantized.model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def test_spectra_of_the_first_middle_and_last_block_are_those_of_the_rounding_error(quantized):
    assert [spectra_file(block) in quantized.checkpoint for block in range(4)] == [True, False, True, True]
    sites = all_sites(quantized.calibration)
    spectra = quantized.checkpoint.tensors(spectra_file(2))
    statistics = quantized.calibration.tensors(block_file(2))
    names = [row["name"] for row in quantized.checkpoint.json(layers_file(2))]
    assert spectra.keys() == {f"{name}.{kind}" for name in names for kind in ("weight", "plain", "scaled")}
    for name in names:
        error_OI = quantized.model.get_submodule(name).weight.detach() - effective_weight(quantized, 2, name)[0]
        mean_abs_I = statistics[f"{sites[name]}.mean_abs"].double()
        scale_I = mean_abs_I / (mean_abs_I.min() * mean_abs_I.max()).sqrt()
        weight_OI = quantized.model.get_submodule(name).weight.detach()
        torch.testing.assert_close(
            spectra[f"{name}.weight"], torch.linalg.svdvals(weight_OI.double()), rtol=1e-6, atol=1e-8
        )
        torch.testing.assert_close(spectra[f"{name}.plain"], torch.linalg.svdvals(error_OI), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(
            spectra[f"{name}.scaled"], torch.linalg.svdvals(error_OI * scale_I), rtol=1e-6, atol=1e-8
        )


def test_a_killed_run_resumes_to_the_same_bytes(quantized, letter_tokenizer, plan, tmp_path):
    resumed = tmp_path / "resumed"
    with pytest.raises(KilledError):
        # The third block's rows are there already.
        run_quantize(
            dying_workspace(block_file(2))(resumed), quantized.model, letter_tokenizer, quantized.calibration, plan
        )
    written = {path: path.stat().st_mtime_ns for path in map(resumed.joinpath, map(block_file, range(2)))}
    run_quantize(Workspace(resumed), quantized.model, letter_tokenizer, quantized.calibration, plan)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    names = {path.name for path in quantized.checkpoint.path.iterdir()} - {"manifest.json"}
    assert names == {path.name for path in resumed.iterdir()} - {"journal.json"}
    for name in names:
        assert (resumed / name).read_bytes() == (quantized.checkpoint.path / name).read_bytes(), name


@pytest.mark.parametrize(
    ("value", "found"), [(float("nan"), "1 NaN and 0 infinite"), (-torch.inf, "0 NaN and 1 infinite")]
)
def test_a_broken_weight_is_named(random_model, run_stages, plan, letter_tokenizer, tmp_path, value, found):
    model = random_model("llama")
    calibration = run_stages(model, plan).calibration
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    with pytest.raises(ModelError, match=rf"model\.layers\.1\.mlp\.up_proj: {found}"):
        run_quantize(Workspace(tmp_path), model, letter_tokenizer, calibration, plan)


def test_a_broken_bias_is_named(random_model, run_stages, plan, letter_tokenizer, tmp_path):
    model = random_model("opt")
    calibration = run_stages(model, plan).calibration
    model.model.decoder.layers[0].fc1.bias.data[3] = torch.nan
    with pytest.raises(ModelError, match=r"model\.decoder\.layers\.0\.fc1: 1 NaN"):
        run_quantize(Workspace(tmp_path), model, letter_tokenizer, calibration, replace(plan, bias=MXInt(bits=8)))


class Unreached(Artifact):
    """A calibration whose text never reached one linear, as happens to a rarely used expert."""

    def json(self, name):
        table = super().json(name)
        del table["model.layers.0.mlp.down_proj"]
        return table


def test_a_linear_that_calibration_never_reached_is_named(quantized, letter_tokenizer, plan, tmp_path):
    calibration = Unreached(quantized.calibration.path)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.down_proj was never reached by the calibration text"):
        run_quantize(Workspace(tmp_path), quantized.model, letter_tokenizer, calibration, plan)


def test_linears_of_a_site_share_the_factor_of_their_hessian(
    random_model, windows_WT, letter_tokenizer, tmp_path, monkeypatch
):
    model = random_model("llama", num_hidden_layers=1)
    statistics = Workspace(tmp_path / "statistics")
    calibrate(statistics, resident(model), CalibrationText(windows_WT, 2, 8), {Hessian()})
    widths = []
    factor = DampedHessian.factor
    monkeypatch.setattr(
        DampedHessian, "factor", lambda self, *order: widths.append(len(self.dead_I)) or factor(self, *order)
    )
    plan = LinearPlan(QeraExact(), Int(4, 16), rank=2, rounding=Gptq())
    workspace = run_quantize(Workspace(tmp_path / "shared"), model, letter_tokenizer, statistics, plan)
    # Of q k v, o, gate up and down.
    hidden = model.config.hidden_size
    assert widths == [hidden, hidden, hidden, model.config.intermediate_size]

    site_statistics = gather.SiteStatistics
    monkeypatch.setattr(gather, "SiteStatistics", lambda tensors: dict(site_statistics(tensors)))
    alone = run_quantize(Workspace(tmp_path / "alone"), model, letter_tokenizer, statistics, plan)
    assert len(widths) == 4 + 7
    for name in (block_file(0), layers_file(0)):
        assert (workspace.path / name).read_bytes() == (alone.path / name).read_bytes()


def test_spectra_are_found_later_only_of_blocks_that_a_gpu_has_room_for():
    assert bytes_of_later_spectra(32 * 4096 * 4096) == 2**32
    assert bytes_of_later_spectra(32 * 4096 * 4096 + 1) == 0
    seven, seventy = ({"q": torch.Size(shape)} for shape in ((4096, 4 * 4096 + 3 * 11008), (8192, 3 * 28672)))
    assert BlockWork(0, "block", seven, {}, with_spectra=True).finds_spectra_later
    assert not BlockWork(0, "block", seventy, {}, with_spectra=True).finds_spectra_later


def test_spectra_that_are_found_later_are_those_of_the_matrices_given(monkeypatch):
    weight_OI, rounded_OI = torch.randn(6, 4), torch.zeros(6, 4)
    find = later_spectra("q", weight_OI, rounded_OI, {"mean_abs": torch.ones(4)})
    monkeypatch.setattr(layer_rows, "singular_values", lambda *_: pytest.fail("found twice, or not at once on a CPU"))
    torch.testing.assert_close(find()["q.plain"], torch.linalg.svdvals(weight_OI.double()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_spectra_that_a_gpu_finds_later_are_those_that_it_finds_at_once():
    weight_OI = torch.randn(600, 400, device="cuda")
    given = "q", weight_OI, weight_OI.round(), {"mean_abs": weight_OI.abs().mean(0)}
    at_once, later = (later_spectra(*given, at_once=now)() for now in (True, False))
    assert all(values.device == CPU for values in later.values())
    torch.testing.assert_close(later, {key: values.cpu() for key, values in at_once.items()}, rtol=1e-10, atol=0)


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 9, 32])
def test_on_a_gpu_others_follow_the_last_block_and_its_spectra_and_one_without_is_ahead_of_the_first(blocks):
    order = ends_in_between(blocks)
    assert sorted(order) == list(range(blocks))
    assert blocks == 1 or order[-1] != blocks - 1
    assert blocks < 8 or order[0] not in blocks_with_spectra(blocks)


def test_blocks_have_the_same_bytes_in_whatever_order_they_are_quantized(quantized, plan, tmp_path):
    workspace, statistics_of = Workspace(tmp_path), stored_statistics(quantized.calibration)
    settings = settings_for(quantized.model, plan)
    quantize_blocks(workspace, ends_in_between(4), resident(quantized.model), statistics_of, settings)
    for index in range(4):
        for file in (block_file(index), layers_file(index)):
            assert (tmp_path / file).read_bytes() == (quantized.checkpoint.path / file).read_bytes()
