"""The search on a GPU against the one in PyTorch; without a GPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from lqer.formats import Trellis, viterbi
from lqer.formats.viterbi_kernel import best_paths

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (bits, state_bits, sequences, positions), long enough for any overlap at both ends: one entry of a thread, more, and
# fewer entries than threads.
CASES = [(2, 12, 3, 8), (1, 12, 2, 11), (3, 12, 2, 6), (4, 12, 2, 5), (2, 8, 33, 9), (2, 15, 1, 7)]
ON_A_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="takes minutes in the interpreter")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def total_error(x_NP, table_S, states_NP):
    return (x_NP - table_S.float()[states_NP]).double().square().sum(1)


@pytest.mark.parametrize(("bits", "state_bits", "sequences", "positions"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("closed", [False, True])
def test_the_paths_are_as_good_as_those_found_in_pytorch(bits, state_bits, sequences, positions, dtype, closed):
    x_NP, table_S = normal(sequences, positions), normal(1 << state_bits, seed=1).to(dtype)
    overlap_N = (torch.arange(sequences, device=DEVICE) * 7) % (1 << (state_bits - bits)) if closed else None
    found_NP = best_paths(x_NP, table_S, bits, overlap_N)
    expected_NP = viterbi.best_paths(x_NP, table_S, bits, overlap_N)
    assert found_NP.dtype == torch.int64
    # Costs differ in the last bit, so that of two paths as good either may be found.
    assert float((found_NP != expected_NP).float().mean()) < 0.01
    errors = [total_error(x_NP, table_S, states_NP) for states_NP in (found_NP, expected_NP)]
    torch.testing.assert_close(*errors, rtol=1e-5, atol=1e-5)
    if overlap_N is not None:
        assert torch.equal(found_NP[:, 0] >> bits, overlap_N)
        assert torch.equal(found_NP[:, -1] % (1 << (state_bits - bits)), overlap_N)


def test_sequences_beyond_one_launch_are_searched_too(monkeypatch):
    x_NP, table_S = normal(5, 6), normal(1 << 8, seed=1)
    usual_NP = best_paths(x_NP, table_S, 2)
    monkeypatch.setattr("lqer.formats.viterbi_kernel.SEARCH_BYTES", 2 * 6 * 64)
    assert torch.equal(best_paths(x_NP, table_S, 2), usual_NP)


@ON_A_GPU
@pytest.mark.parametrize(("bits", "state_bits"), [(2, 12), (3, 12), (4, 12), (2, 14), (2, 16), (4, 16)])
def test_a_matrix_gets_as_good_codes_as_on_the_cpu(bits, state_bits):
    x_OI = normal(64, 64)
    number_format = Trellis(bits, state_bits)
    errors = [float((number_format.quantize(x).dequantize() - x).square().sum()) for x in (x_OI, x_OI.cpu())]
    assert errors[0] == pytest.approx(errors[1], rel=2e-3)
