"""Input sites and their statistics, against hooks on the model itself.

Shapes: T tokens of the whole text, I in_features, S sampled tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from helpers import all_sites, inputs_of_linears, resident
from killing import KilledError, dying_workspace
from torch import Tensor
from transformers import PreTrainedModel

from lqer.errors import ModelError
from lqer.models.structure import find_blocks
from lqer.models.walker import walk_blocks
from lqer.stages.calibrate import calibrate
from lqer.stages.gather import CalibrationText, observe_block
from lqer.statistics import Accumulator, Gang, Hessian, MaxAbs, Statistic
from lqer.store.names import block_file, sites_file
from lqer.store.offload import Offload
from lqer.store.store import Workspace

BATCH_SIZE = 2
ERROR_TOKENS = 24
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SEPARATE = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
OPT = [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}]
SITES = {
    "llama": SEPARATE,
    "mistral": SEPARATE,
    "qwen3": SEPARATE,
    "gemma3": SEPARATE,
    "opt": OPT,
    "opt-350m": OPT,
    "gpt-neox": [{"query_key_value"}, {"dense"}, {"dense_h_to_4h"}, {"dense_4h_to_h"}],
    "phi3": [{"qkv_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}],
    "qwen3.5": [{"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"}, {"out_proj"}, *SEPARATE[2:]],
    "gpt2": [{"attn.c_attn"}, {"attn.c_proj"}, {"mlp.c_fc"}, {"mlp.c_proj"}],
}
# Of the blocks after the first one, where they are of another kind.
LATER_SITES = {"qwen3.5": SEPARATE}


def run_calibration(
    folder: Path,
    model: PreTrainedModel,
    windows_WT: Tensor,
    batch_size: int = BATCH_SIZE,
    make=Workspace,
    requested: Collection[Statistic] = (),
) -> Workspace:
    workspace = make(folder)
    opened = resident(model)
    calibrate(workspace, opened, CalibrationText(windows_WT, batch_size, ERROR_TOKENS), requested)
    return workspace


def test_linears_with_a_common_input_form_one_site(stages, architecture):
    groups = defaultdict(set)
    name, blocks = find_blocks(stages.model)
    for linear, site in all_sites(stages.calibration).items():
        block, end = linear.removeprefix(f"{name}.").split(".", 1)
        groups[site].add((int(block), end if architecture == "gpt2" else end.rpartition(".")[2]))
    later = LATER_SITES.get(architecture, SITES[architecture])
    of_blocks = [SITES[architecture], *[later] * (len(blocks) - 1)]
    expected = [{(i, linear) for linear in site} for i, sites in enumerate(of_blocks) for site in sites]
    assert sorted(map(sorted, groups.values())) == sorted(map(sorted, expected))


def test_statistics_are_those_of_the_models_own_forward_pass(stages, windows_WT):
    sites = all_sites(stages.calibration)
    for linear, batches in inputs_of_linears(stages.model, windows_WT, BATCH_SIZE).items():
        block = int(linear.removeprefix(f"{find_blocks(stages.model)[0]}.").split(".")[0])
        site = sites[linear]
        found = stages.calibration.tensors(block_file(block))
        x_TI = torch.cat(batches).double()
        mean_abs_I = torch.stack([batch.double().abs().mean(0) for batch in batches]).amax(0)
        torch.testing.assert_close(found[f"{site}.mean_abs"].double(), mean_abs_I, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found[f"{site}.mean_square"].double(), x_TI.square().mean(0), rtol=1e-6, atol=1e-10)
        rows = [i * len(x_TI) // ERROR_TOKENS for i in range(ERROR_TOKENS)]
        assert torch.equal(found[f"{site}.sample"].double(), x_TI[rows])


def test_only_the_mean_absolute_depends_on_the_batch_size(random_model, windows_WT, tmp_path):
    model = random_model("llama")
    files = {
        size: run_calibration(tmp_path / str(size), model, windows_WT, size).tensors(block_file(1))
        for size in (1, 2, 5)
    }
    for size in (1, 2):
        for name, tensor in files[5].items():
            close = torch.allclose(files[size][name], tensor, rtol=1e-6, atol=1e-6)
            assert close != name.endswith("mean_abs"), name


def test_what_costs_something_is_gathered_only_on_request(random_model, windows_WT, tmp_path):
    model = random_model("llama")
    statistics = {
        tuple(sorted({name.rpartition(".")[2] for name in tensors}))
        for requested in ((), (MaxAbs(),), (Hessian(),))
        for tensors in [
            run_calibration(tmp_path / str(requested), model, windows_WT, requested=requested).tensors(block_file(0))
        ]
    }
    always = ("mean_abs", "mean_square", "sample")
    assert statistics == {always, tuple(sorted((*always, "max_abs"))), ("hessian", *always)}


def test_the_requested_statistics_are_those_of_the_models_own_forward_pass(random_model, windows_WT, tmp_path):
    model = random_model("llama")
    found = run_calibration(tmp_path, model, windows_WT, requested={Hessian(), MaxAbs()})
    sites = all_sites(found)
    for linear, batches in inputs_of_linears(model, windows_WT, BATCH_SIZE).items():
        tensors = found.tensors(block_file(int(linear.split(".")[2])))
        x_TI = torch.cat(batches).double()
        hessian_II = x_TI.T @ x_TI / len(x_TI)
        stored_II = tensors[f"{sites[linear]}.hessian"]
        assert stored_II.dtype == torch.float32
        assert torch.equal(stored_II, stored_II.T)
        torch.testing.assert_close(
            stored_II.double(), hessian_II, rtol=0, atol=1e-6 * float(hessian_II.diagonal().mean())
        )
        torch.testing.assert_close(stored_II.diagonal(), tensors[f"{sites[linear]}.mean_square"], rtol=1e-6, atol=0)
        assert torch.equal(tensors[f"{sites[linear]}.max_abs"].double(), x_TI.abs().amax(0))
    # q, k and v share one matrix, gate and up another.
    assert sum(name.endswith(".hessian") for name in found.tensors(block_file(0))) == 4


@needs_gpu
def test_statistics_on_a_gpu_are_those_of_the_cpu(random_model, windows_WT, tmp_path):
    """All of a model's, in float32, as the walker gathers them block by block."""
    model = random_model("llama")
    here = run_calibration(tmp_path / "cpu", model, windows_WT, requested={Hessian(), MaxAbs()})
    there = Workspace(tmp_path / "gpu")
    opened = resident(model, "cuda")
    calibrate(there, opened, CalibrationText(windows_WT, BATCH_SIZE, ERROR_TOKENS), {Hessian(), MaxAbs()})
    assert all_sites(here) == all_sites(there)
    for index in range(2):
        expected, found = here.tensors(block_file(index)), there.tensors(block_file(index))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max()))


class DeviationAccumulator:
    def __init__(self, in_features: int):
        self.sum_II, self.tokens = torch.zeros(in_features, in_features, dtype=torch.float64), 0

    def add(self, x_NI: Tensor, original_NI: Tensor | None, sampled_N: Tensor) -> None:
        assert original_NI is not None
        self.sum_II += (original_NI - x_NI).double().T @ x_NI.double()
        self.tokens += len(x_NI)

    def join(self, gang: Gang) -> None:
        gang.sum_(self.sum_II)
        self.tokens = sum(gang.gathered(self.tokens))

    def result(self) -> Tensor:
        return self.sum_II / self.tokens


@dataclass(frozen=True)
class Deviation(Statistic):
    """E[(x_original - x) xᵀ], as a rounding such as GPTAQ needs it (arXiv 2504.02692)."""

    kind = "deviation"
    needs_original: ClassVar[bool] = True

    def accumulator(self, in_features: int, device: torch.device, offload: Offload) -> Accumulator:
        return DeviationAccumulator(in_features)

    def nbytes(self, in_features: int) -> int:
        return 8 * in_features**2


@torch.no_grad()
def test_a_statistic_of_pairs_is_given_both_inputs_of_every_token(random_model, windows_WT):
    """The second block, after a first one whose weights differ; both sides against hooks on whole models."""
    original, changed = random_model("llama"), random_model("llama")
    changed.load_state_dict(original.state_dict())
    for parameter in changed.model.layers[0].parameters():
        parameter.mul_(1.1)
    text = CalibrationText(windows_WT, BATCH_SIZE, ERROR_TOKENS)
    runs = [walk_blocks(resident(model), windows_WT, 2) for model in (original, changed)]
    for first in [next(run) for run in runs]:
        first.forward()
    original_run, changed_run = (next(run) for run in runs)
    before_WTD = original_run.hidden.states_WTD.clone()
    found = observe_block(changed_run, original_run, text, {Deviation()})
    assert torch.equal(original_run.hidden.states_WTD, before_WTD)
    expected = [inputs_of_linears(model, windows_WT, BATCH_SIZE) for model in (original, changed)]
    for linear, site in found.sites.items():
        original_TI, x_TI = (torch.cat(inputs[linear]).double() for inputs in expected)
        deviation_II = (original_TI - x_TI).T @ x_TI / len(x_TI)
        assert deviation_II.abs().max() > 1e-3 * x_TI.square().mean()
        scale = float(x_TI.square().mean())
        torch.testing.assert_close(found.tensors[f"{site}.deviation"], deviation_II, rtol=0, atol=1e-5 * scale)


@torch.no_grad()
def test_both_runs_of_a_pair_may_be_of_one_block(random_model, windows_WT):
    opened = resident(random_model("llama"))
    text = CalibrationText(windows_WT, BATCH_SIZE, ERROR_TOKENS)
    run = next(walk_blocks(opened, windows_WT, 2))
    found = observe_block(run, run, text, {Deviation()})
    assert all(not tensor.any() for name, tensor in found.tensors.items() if name.endswith(".deviation"))


def test_a_killed_calibration_resumes_to_the_same_bytes(random_model, windows_WT, tmp_path):
    model = random_model("gemma3")
    run_calibration(tmp_path / "whole", model, windows_WT)
    resumed = tmp_path / "resumed"
    with pytest.raises(KilledError):
        run_calibration(resumed, model, windows_WT, make=dying_workspace(block_file(1)))
    assert (resumed / block_file(0)).exists()
    assert not (resumed / block_file(1)).exists()
    first_block_written = (resumed / block_file(0)).stat().st_mtime_ns
    run_calibration(resumed, model, windows_WT)
    assert (resumed / block_file(0)).stat().st_mtime_ns == first_block_written
    for name in (*map(sites_file, range(3)), *map(block_file, range(3))):
        assert (resumed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    "broken", ["model.embed_tokens", "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.down_proj", "lm_head"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_in_a_weight_are_reported_there(random_model, windows_WT, tmp_path, broken, value):
    model = random_model("llama")
    model.get_submodule(broken).weight.data[:, 0] = value
    with pytest.raises(ModelError, match=rf"model: {broken}\.weight holds NaN or infinities \(in float32\)"):
        run_calibration(tmp_path, model, windows_WT, requested={Hessian(), MaxAbs()})


@pytest.mark.parametrize("requested", [set(), {Hessian(), MaxAbs()}])
def test_activations_that_overflow_are_reported_at_the_first_linear_they_reach(
    random_model, windows_WT, tmp_path, requested
):
    model = random_model("llama").half()
    for name in ("gate_proj", "up_proj"):
        model.get_submodule(f"model.layers.1.mlp.{name}").weight.data.mul_(1e4)
    overflow = r"inputs of model\.layers\.1\.mlp\.down_proj hold NaN or infinities.*activations in float16 overflow"
    with pytest.raises(ModelError, match=overflow):
        run_calibration(tmp_path, model, windows_WT, requested=requested)
