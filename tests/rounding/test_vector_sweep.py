"""GPTVQ's vectors in one kernel; without a GPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from vq_layers import loss, round_vector, student_layer

from lqer.formats import Codebook
from lqer.rounding import vector
from lqer.rounding.vector_sweep import sweep_panel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (columns, groups, rows of a group, centroids, dimension)
CASES = [(128, 2, 8, 16, 2), (40, 3, 7, 4, 1), (48, 1, 11, 256, 4), (2, 2, 3, 16, 2)]


@pytest.mark.parametrize(("columns", "groups", "group_rows", "centroids", "dimension"), CASES)
def test_the_kernel_walks_the_vectors_as_the_loop_does(columns, groups, group_rows, centroids, dimension):
    generator = torch.Generator().manual_seed(columns)
    panel_PO = torch.randn(columns, groups * group_rows, generator=generator).to(DEVICE)
    scale_PO = torch.rand(panel_PO.shape, generator=generator).add(0.5).to(DEVICE)
    importance_P1 = torch.rand(columns, 1, generator=generator).add(0.5).to(DEVICE)
    feedback_PP = torch.randn(columns, columns, generator=generator).triu(1).mul(0.1).to(DEVICE)
    centroids_GKD = torch.randn(groups, centroids, dimension, generator=generator).to(DEVICE)
    before_PO = panel_PO.clone()
    codes_VO, error_PO = sweep_panel(panel_PO, scale_PO, importance_P1, feedback_PP, centroids_GKD)
    assert torch.equal(panel_PO, before_PO)
    expected_codes_VO, expected_error_PO = vector._panel_vector_by_vector(
        panel_PO, scale_PO, importance_P1, feedback_PP, centroids_GKD
    )
    # Distances differ in the last bit, so a vector between two centroids may go either way.
    assert (codes_VO != expected_codes_VO).float().mean() <= 2e-3
    same_O = (codes_VO == expected_codes_VO).all(0)
    assert same_O.any()
    torch.testing.assert_close(error_PO[:, same_O], expected_error_PO[:, same_O], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "number_format", [Codebook(2, 2, 1024), Codebook(2, 1, 256, scale_block_size=32)], ids=["2D", "1D scaled"]
)
def test_gptvq_in_the_kernel_is_gptvq_vector_by_vector(monkeypatch, number_format):
    weight_OI, hessian_II = (tensor.to(DEVICE) for tensor in student_layer(13, 192))
    found = {}
    ways = {way: getattr(vector, way) for way in ("_panel_in_one_kernel", "_panel_vector_by_vector")}
    for way, panel in ways.items():
        for replaced in ways:
            monkeypatch.setattr(vector, replaced, panel)
        found[way] = round_vector(weight_OI, hessian_II, number_format).dequantize()
    a_OI, b_OI = found.values()
    assert (a_OI != b_OI).float().mean() < 0.02
    assert loss(weight_OI, hessian_II, a_OI) == pytest.approx(loss(weight_OI, hessian_II, b_OI), rel=1e-2)
