"""Losses computed in pieces: those of the definition, whatever the pieces."""

from __future__ import annotations

import pytest
import torch

from lqer.training import loss
from lqer.training.loss import soft_loss, text_loss


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 9, 11, generator=generator, dtype=torch.float32) for _ in range(2)]


@pytest.mark.parametrize("positions", [1, 6, 1024])
def test_the_soft_loss_is_the_cross_entropy_with_the_original_in_any_pieces(logits, positions, monkeypatch):
    monkeypatch.setattr(loss, "POSITIONS", positions)
    student_BTV, original_BTV = logits
    student_BTV.requires_grad_()
    target_BTV = original_BTV[:, :-1].double().softmax(-1)
    expected = -(target_BTV * student_BTV.detach()[:, :-1].double().log_softmax(-1)).sum(-1).mean()
    found = soft_loss(student_BTV, original_BTV)
    assert found.item() == pytest.approx(float(expected), rel=1e-6)
    found.backward()
    # The gradient of a cross-entropy: the difference of the two distributions.
    gradient_BTV = (student_BTV[:, :-1].detach().double().softmax(-1) - target_BTV) / (2 * 8)
    torch.testing.assert_close(student_BTV.grad[:, :-1].double(), gradient_BTV, rtol=1e-4, atol=1e-7)
    assert not student_BTV.grad[:, -1].any()


def test_the_loss_of_the_original_itself_is_its_entropy_and_the_smallest(logits):
    student_BTV, original_BTV = logits
    entropy = torch.distributions.Categorical(logits=original_BTV[:, :-1]).entropy().mean()
    assert float(soft_loss(original_BTV, original_BTV)) == pytest.approx(float(entropy), rel=1e-5)
    assert soft_loss(original_BTV, original_BTV) < soft_loss(student_BTV, original_BTV)


@pytest.mark.parametrize("positions", [1, 6, 1024])
def test_the_text_loss_is_that_of_the_next_token_in_any_pieces(logits, positions, monkeypatch):
    monkeypatch.setattr(loss, "POSITIONS", positions)
    student_BTV, _ = logits
    ids_BT = torch.arange(18).reshape(2, 9) % 11
    expected = -student_BTV[:, :-1].log_softmax(-1).gather(2, ids_BT[:, 1:, None]).mean()
    assert float(text_loss(student_BTV, ids_BT)) == pytest.approx(float(expected), rel=1e-5)
