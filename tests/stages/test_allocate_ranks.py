"""The ranks that follow from the spectra under a budget."""

from __future__ import annotations

import pytest
from helpers import quantize, resident
from measured_spectra import BLOCKS, FIXED_RANK, SKIPPED

from lqer.checkpoint.bits import average_bits
from lqer.errors import ConfigError
from lqer.stages.allocate_ranks import allocate_ranks, check_ranks
from lqer.stages.gather import stored_statistics
from lqer.stages.quantize_linears import QuantizeSettings
from lqer.store.names import layers_file
from lqer.store.store import Workspace


def ranks_under(measured, budget_bits):
    return allocate_ranks(measured.plans, measured.tensors, measured.shapes, budget_bits)


def quantized_rows(measured, letter_tokenizer, plans, folder):
    workspace, settings = Workspace(folder), QuantizeSettings(plans, None, 0)
    statistics_of = stored_statistics(measured.calibration)
    quantize(workspace, resident(measured.model), letter_tokenizer, statistics_of, settings)
    return [row for i in range(BLOCKS) for row in workspace.json(layers_file(i))]


@pytest.mark.parametrize("budget_bits", [4.5, 6.0, 7.25])
def test_the_models_bits_meet_the_budget_from_below(measured_spectra, letter_tokenizer, tmp_path, budget_bits):
    found = ranks_under(measured_spectra, budget_bits)
    rows = quantized_rows(measured_spectra, letter_tokenizer, found.plans, tmp_path)
    average = average_bits(rows)["average"]
    assert average == pytest.approx(found.average_bits, abs=1e-12)
    # A step of the smallest linear of this tiny model is far more than a hundredth of a bit.
    smallest_step = 8 * (64 + 32) * 9 / sum(row["out_features"] * row["in_features"] for row in rows)
    assert budget_bits - smallest_step < average <= budget_bits
    ranks = {row["name"]: row["rank"] for row in rows}
    assert ranks[FIXED_RANK] == 16
    assert SKIPPED not in ranks
    assert all(rank % 8 == 0 for rank in ranks.values())
    assert all(ranks[name] == rank for name, rank in found.allocation.ranks.items())


def test_the_objective_is_what_the_quantized_layers_leave(measured_spectra, letter_tokenizer, tmp_path):
    """Summed from the solver's own captured energies, and no more than at the uniform rank."""
    found, tensors = ranks_under(measured_spectra, 6.0), measured_spectra.tensors
    rows = {row["name"]: row for row in quantized_rows(measured_spectra, letter_tokenizer, found.plans, tmp_path)}
    left = 0.0
    for name in found.allocation.ranks:
        missed = 1 - (rows[name]["captured_energy"] or 0.0)
        left += missed * float(tensors[f"{name}.energies"].sum() / tensors[f"{name}.weight_energy"])
    assert left == pytest.approx(found.allocation.objective, rel=1e-6)
    assert found.allocation.objective < 0.95 * found.allocation.uniform_objective
    assert found.uniform_average_bits <= 6.0


def test_the_kind_of_linear_with_the_larger_errors_gets_the_larger_ranks(measured_spectra):
    ranks = ranks_under(measured_spectra, 6.0).allocation.ranks
    of = {kind: [rank for name, rank in ranks.items() if name.endswith(kind)] for kind in ("v_proj", "k_proj")}
    assert sum(of["v_proj"]) > sum(of["k_proj"])


def test_a_budget_below_the_weights_alone_is_refused(measured_spectra):
    with pytest.raises(
        ConfigError, match=r"budget_bits: must be at least 3\.\d+, the bits of the weights .* alone; found 3.2"
    ):
        ranks_under(measured_spectra, 3.2)
    with pytest.raises(ConfigError, match=r"must be at least 3\.\d+, .*found 3\.2"):
        check_ranks(measured_spectra.plans, measured_spectra.shapes, 3.2)
    check_ranks(measured_spectra.plans, measured_spectra.shapes, 3.5)
