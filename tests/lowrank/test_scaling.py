"""L²QER's scale of the input channels."""

from __future__ import annotations

import pytest
import torch

from lqer.lowrank.scaling import activation_scale


def test_the_scale_is_proportional_to_the_mean_absolute_and_centred_between_its_extremes():
    mean_abs_I = torch.tensor([0.5, 8.0, 0.25, 2.0])
    scale_I = activation_scale(mean_abs_I)
    torch.testing.assert_close(scale_I / scale_I[0], mean_abs_I / mean_abs_I[0])
    assert float(scale_I.min() * scale_I.max()) == pytest.approx(1)


def test_channels_that_were_hardly_ever_lit_count_as_one_ten_thousandth():
    scale_I = activation_scale(torch.tensor([0.0, 1e-6, 1e-4, 1.0]))
    torch.testing.assert_close(scale_I, torch.tensor([1e-2, 1e-2, 1e-2, 1e2]))


def test_a_site_without_any_input_gets_a_scale_of_ones():
    torch.testing.assert_close(activation_scale(torch.zeros(5)), torch.ones(5))
