"""The rectified sigmoid and its inverse."""

from __future__ import annotations

import pytest
import torch

from lqer.rounding.rectified import inverse_rectified_sigmoid, rectified_sigmoid


def test_the_rectified_sigmoid_undoes_its_inverse():
    fractions = torch.linspace(0, 1, 1001)[:-1]
    torch.testing.assert_close(rectified_sigmoid(inverse_rectified_sigmoid(fractions)), fractions, atol=1e-6, rtol=0)
    assert rectified_sigmoid(torch.tensor([-torch.inf, -9.0, 0.0, 9.0, torch.inf])).tolist() == [0, 0, 0.5, 1, 1]
    assert inverse_rectified_sigmoid(torch.tensor(0.0)) == pytest.approx(-2.3979, abs=1e-4)
