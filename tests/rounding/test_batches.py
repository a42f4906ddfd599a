"""Batches of sequences from states on any device."""

from __future__ import annotations

import pytest
import torch

from lqer.rounding.batches import Goal, batch_of, numbers_of, trained_dtype

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def test_every_batch_holds_the_chosen_sequences_of_all_states():
    inputs_STD, targets_STD = torch.randn(6, 3, 4), torch.randn(6, 3, 4)
    chosen = [torch.tensor([5, 0]), torch.tensor([1]), torch.tensor([2, 2, 3])]
    for kept_on in DEVICES:
        for device in DEVICES:
            states = [inputs_STD.to(kept_on), targets_STD]
            batches = [batch_of(states, numbers, torch.device(device)) for numbers in numbers_of(states, chosen)]
            assert len(batches) == len(chosen)
            for (inputs_BTD, targets_BTD), chosen_B in zip(batches, chosen, strict=True):
                assert inputs_BTD.device.type == targets_BTD.device.type == device
                assert torch.equal(inputs_BTD.cpu(), inputs_STD[chosen_B])
                assert torch.equal(targets_BTD.cpu(), targets_STD[chosen_B])


def test_a_cpu_trains_weights_in_float32_and_a_gpu_as_autocast_says():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert trained_dtype(cpu, torch.bfloat16) == trained_dtype(gpu, None) == torch.float32
    assert trained_dtype(gpu, torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_the_gradients_of_a_batch_are_those_of_its_mean_loss_against_all_targets(micro_batch):
    generator = torch.Generator().manual_seed(0)
    inputs_STD, first_STD, second_STD = torch.randn(3, 6, 3, 4, generator=generator)
    factor = torch.randn(4, generator=generator).requires_grad_()
    unused = torch.ones(4, requires_grad=True)

    def loss_of(outputs_BTD, targets_BTD):
        return (outputs_BTD - targets_BTD).square().mean()

    def block(weights, x_BTD):
        return x_BTD * weights["scale"]

    goal = Goal(block, inputs_STD, [first_STD, second_STD])
    batches = [torch.tensor([5, 0, 3, 1]), torch.tensor([2, 4, 1])]
    found = goal.gradients(
        lambda dtype: {"scale": 2 * factor, "unused": 2 * unused}, factor.device, loss_of, batches, micro_batch
    )
    for batch_B, losses in zip(batches, found, strict=True):
        outputs = inputs_STD[batch_B] * (2 * factor)
        loss = loss_of(outputs, first_STD[batch_B]) + loss_of(outputs, second_STD[batch_B])
        (expected,) = torch.autograd.grad(loss, factor)
        torch.testing.assert_close(factor.grad, expected)
        torch.testing.assert_close(sum(losses), loss.detach())
        assert len(losses) == -(-len(batch_B) // micro_batch)
        assert unused.grad is None
        factor.grad = None
