"""What gradients foretell of given errors, against the divergence that is measured."""

from __future__ import annotations

import pytest
import torch
from harm.estimates import STRETCHES, estimates
from harm.subject import Ruler, Subject
from helpers import resident

from lqer.stages.gather import CalibrationText

NAME = "model.layers.1.self_attn.v_proj.weight"


@pytest.fixture(scope="module")
def subject(random_model, windows_WT) -> Subject:
    model = random_model("llama").float()
    text, rulers = CalibrationText(windows_WT, 2, 24), {"text": Ruler(model, windows_WT)}
    return Subject(resident(model), text, windows_WT[:0], rulers)


def test_squares_of_sums_over_windows_foretell_the_divergence_and_those_of_tokens_do_not(subject, windows_WT):
    """Of errors whose rows are independent, and small, so that the second order is all there is."""
    weight_OI, generator = subject.weights()[NAME], torch.Generator().manual_seed(0)
    # Many draws of the tokens that gradients are of.
    often_WT = windows_WT.repeat(16, 1)
    measured, found = [], []
    for _ in range(12):
        error_OI = 0.02 * torch.randn(weight_OI.shape, generator=generator)
        measured.append(subject.harms({NAME: weight_OI - error_OI})[0].kl)
        found.append(estimates(subject, {NAME: error_OI}, often_WT)[NAME])
    ratios = torch.tensor(found).mean(0) / torch.tensor(measured).mean()
    by_stretch = dict(zip(STRETCHES, ratios.tolist(), strict=True))
    assert by_stretch[None] == pytest.approx(1, abs=0.1)
    assert by_stretch[1] < 0.7
