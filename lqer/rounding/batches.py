"""What weights of a decoder block are trained for, and the batches they see, handed to a GPU without waiting for it.

Shapes: S sequences, T tokens, D hidden size, B sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lqer.statistics import ALONE, Gang

# The numbers of a batch's sequences, int64 (B,): one tensor for each of several states, on the device of that state.
Numbers = tuple[Tensor, ...]
Weights = Mapping[str, Tensor]
Block = Callable[[Weights, Tensor], Tensor]
# loss_of(outputs_BTD, targets_BTD): a scalar, a mean over sequences.
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Goal:
    """Outputs of a block that are close to its targets; the losses against several targets are added.

    block(weights, inputs_BTD) -> outputs_BTD, differentiable in the weights, which it gets in float32, or on a GPU in
    the dtype of `autocast`. inputs_STD, targets (S, T, D): float, on any device. autocast: the dtype of the block's
    products, None for its own. gang: shares out the micro-batches of a step. Raises ValueError for targets of another
    number of sequences.
    """

    block: Block
    inputs_STD: Tensor
    targets: Sequence[Tensor]
    autocast: torch.dtype | None = None
    gang: Gang = ALONE

    def __post_init__(self) -> None:
        for targets_STD in self.targets:
            if len(targets_STD) != len(self.inputs_STD):
                raise ValueError(f"{len(self.inputs_STD)} sequences of inputs and {len(targets_STD)} of targets")

    def gradients(
        self,
        make: Callable[[torch.dtype], Weights],
        device: torch.device,
        loss_of: Loss,
        batches: Sequence[Tensor],
        micro_batch: int,
    ) -> Iterator[list[Tensor]]:
        """For every batch, add the gradients of its loss to those of the variables that the weights are made of.

        make(dtype) -> weights on the device, differentiable; they are made anew for every batch. batches: sequence
        numbers, int64 (B,). micro_batch: sequences in one forward pass. Yields what each pass adds to the loss of the
        batch, without waiting for a GPU; the caller takes the optimizer's step and clears the gradients.
        """
        micro_batches = [micro_B for batch_B in batches for micro_B in batch_B.split(micro_batch)]
        numbers = iter(numbers_of([self.inputs_STD, *self.targets], micro_batches))
        # The gradients of several micro-batches are added up in float32.
        in_one_pass = all(len(batch_B) <= micro_batch for batch_B in batches)
        dtype = trained_dtype(device, self.autocast) if in_one_pass else torch.float32
        for batch_B in batches:
            made = make(dtype)
            leaves = {name: weight_OI.detach().requires_grad_() for name, weight_OI in made.items()}
            of_batch = [next(numbers) for _ in range(0, len(batch_B), micro_batch)]
            backward = partial(self._add_gradients, loss_of, leaves, len(batch_B))
            losses = self.gang.add_gradients(of_batch, backward, [*leaves.values()])
            # Once, with the gradients of all micro-batches.
            _back_through(made, leaves)
            yield losses

    def _add_gradients(self, loss_of: Loss, leaves: Weights, batch_size: int, numbers: Numbers) -> Tensor:
        """Add the gradients of a micro-batch to those of the leaves. Returns its share of the batch's loss."""
        device = next(iter(leaves.values())).device
        inputs_BTD, *wanted = batch_of([self.inputs_STD, *self.targets], numbers, device)
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            outputs_BTD = self.block(leaves, inputs_BTD)
        losses = torch.stack([loss_of(outputs_BTD, targets_BTD) for targets_BTD in wanted])
        loss = losses.sum() * (len(inputs_BTD) / batch_size)
        loss.backward()
        return loss.detach()


def numbers_of(states: Sequence[Tensor], chosen: Sequence[Tensor]) -> list[Numbers]:
    """The sequence numbers of every batch, int64 (B,), where each of the states (S, T, D) is.

    They are copied once, before the first batch: each copy waits for a GPU.
    """
    sizes, all_chosen = [len(chosen_B) for chosen_B in chosen], torch.cat([*chosen])
    numbers = [all_chosen.to(states_STD.device).split(sizes) for states_STD in states]
    return [*zip(*numbers, strict=True)]


def batch_of(states: Sequence[Tensor], numbers: Numbers, device: torch.device) -> list[Tensor]:
    """The sequences (B, T, D) of all states (S, T, D) that have these numbers, on a device."""
    return [_moved(states_STD[numbers_B], device) for states_STD, numbers_B in zip(states, numbers, strict=True)]


def _moved(x: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and not x.is_cuda:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _back_through(made: Weights, leaves: Weights) -> None:
    """Go on backward from the weights with the gradients that their leaves have."""
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    torch.autograd.backward([made[name] for name in gradients], [*gradients.values()])


def trained_dtype(device: torch.device, autocast: torch.dtype | None) -> torch.dtype:
    """The dtype of a weight that is made anew for every step: on a GPU that of autocast, else float32."""
    return autocast if autocast is not None and device.type == "cuda" else torch.float32
