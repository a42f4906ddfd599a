"""Batches of sequences from states on any device."""

from __future__ import annotations

import torch

from lqer.rounding.batches import batch_of, numbers_of, trained_dtype

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
