"""The clipped range of every group of a block's weights, learnt by gradient (OmniQuant, arXiv 2308.13137, section 3.2).

A group's range [lo, hi] becomes [sigmoid(b) lo, sigmoid(a) hi] with a and b learnt (both 4 at first, sigmoid(4) = 0.98)
so that the block's output with rounded weights stays close to its target:

    s = (hi' - lo') / (2^bits - 1)      z = round(-lo' / s)       w_q = (clamp(round(w / s) + z, 0, 2^bits - 1) - z) s

The gradient of `round`, and of rounding s to the dtype it is stored in, is taken as 1 (straight-through). A symmetric
format has s = max(|lo'|, |hi'|) / (2^(bits-1) - 1) and no z. A power-of-two scale has no gradient: `int` only.

Shapes: S sequences, T tokens, D hidden size, O out_features, I in_features, N groups of a row, B sequences of a batch,
or values of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lqer.formats import Int, NumberFormat, QuantizedTensor
from lqer.formats.blocks import from_blocks, to_blocks
from lqer.rounding.batches import Goal
from lqer.statistics.gang import add_up
from lqer.transforms.block_transform import save_nothing
from lqer.transforms.clip import group_range, quantize_clipped

START = 4.0


@dataclass(frozen=True)
class ClippingSettings:
    """Settings of learning; epochs: 20 for three and four bits, 40 for two (OmniQuant), 5 after AWQ.

    micro_batch: sequences in one pass, None for all of a batch; it changes the result only by the order of summation.
    """

    epochs: int = 20
    batch_size: int = 1
    learning_rate: float = 1e-2
    seed: int = 0
    micro_batch: int | None = None


@dataclass(frozen=True)
class ClippingState:
    """The state of learning after an epoch: everything that the remaining epochs need apart from inputs and targets.

    logits: float32 (2, O, N) per weight, of the factors of the low and the high ends. means, squares: AdamW's
    moments of their gradients, of the same shape. losses: the mean loss of every finished epoch, float32 (epochs,).
    """

    logits: dict[str, Tensor]
    means: dict[str, Tensor]
    squares: dict[str, Tensor]
    losses: Tensor

    @property
    def epochs(self) -> int:
        """How many are finished."""
        return len(self.losses)

    def tensors(self) -> dict[str, Tensor]:
        """All of it under flat names, for a file of tensors."""
        kinds = {"logits": self.logits, "means": self.means, "squares": self.squares}
        flat = {f"{kind}.{name}": x_2ON for kind, found in kinds.items() for name, x_2ON in found.items()}
        return {"losses": self.losses, **flat}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ClippingState:
        """The inverse of `tensors`."""
        logits, means, squares = (
            {name.removeprefix(kind): x for name, x in tensors.items() if name.startswith(kind)}
            for kind in ("logits.", "means.", "squares.")
        )
        return cls(logits, means, squares, tensors["losses"])


@dataclass(frozen=True)
class RangeFactors:
    """What the ends of every group's range are multiplied by: float32 (O, N) in (0, 1)."""

    low_ON: Tensor
    high_ON: Tensor


def learn_clipping(
    weights: Mapping[str, Tensor],
    formats: Mapping[str, NumberFormat],
    goal: Goal,
    settings: ClippingSettings,
    state: ClippingState | None = None,
    after_epoch: Callable[[ClippingState], None] = save_nothing,
) -> dict[str, RangeFactors]:
    """The factors of every weight (O, I) in `weights`; `quantize_clipped` with them gives the trained values.

    goal: its targets are the original block's output on the original inputs and, for two bits, on these inputs too.
    state: that of an earlier run, on any device, to resume with the same result; `after_epoch` gets the state after
    every epoch.

    Raises ValueError for a format other than `int`, ArithmeticError where the loss stops being finite.
    """
    for name in weights:
        if not isinstance(formats[name], Int):
            raise ValueError(f"{name}: clipping is learnt for the scales of int, found {formats[name].kind}")
    ranges = {name: torch.stack(group_range(weight_OI, formats[name])) for name, weight_OI in weights.items()}
    state = state or _start(ranges)
    device = next(iter(weights.values())).device
    logits = {name: state.logits[name].to(device, copy=True).requires_grad_() for name in weights}
    # Drawn for all epochs at once, so that a resumed run sees the orders that it would have seen.
    generator = torch.Generator().manual_seed(settings.seed)
    orders = [torch.randperm(len(goal.inputs_STD), generator=generator) for _ in range(settings.epochs)]
    optimizer = _optimizer(logits, state, len(orders[0].split(settings.batch_size)), settings.learning_rate)
    losses = state.losses

    def clipped(dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            name: _rounded(weight_OI, formats[name], ranges[name], logits[name], dtype)
            for name, weight_OI in weights.items()
        }

    for epoch in range(state.epochs, settings.epochs):
        loss = _epoch(clipped, logits, goal, orders[epoch].split(settings.batch_size), optimizer, settings)
        # Once an epoch: looking at every loss would have a GPU waited for at every step.
        if not torch.isfinite(loss):
            raise ArithmeticError(f"epoch {epoch + 1} of {settings.epochs} diverged: its loss is {float(loss)}")
        losses = torch.cat([losses, loss.reshape(1).cpu()])
        after_epoch(_reached(logits, optimizer, losses))
    return {name: RangeFactors(*logits_2ON.detach().sigmoid()) for name, logits_2ON in logits.items()}


def _epoch(
    clipped: Callable[[torch.dtype], dict[str, Tensor]],
    logits: Mapping[str, Tensor],
    goal: Goal,
    batches: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    settings: ClippingSettings,
) -> Tensor:
    """One step on each of the batches, of sequence numbers (B,). Returns the mean loss without waiting for a GPU.

    clipped: the weights under the current logits, in a dtype.
    """
    device = next(iter(logits.values())).device
    total = torch.zeros((), device=device)
    micro_batch = settings.micro_batch or settings.batch_size
    for losses in goal.gradients(clipped, device, _mean_square, batches, micro_batch):
        for logits_2ON in logits.values():
            if logits_2ON.grad is None:  # of an expert that no token of the batch reaches
                logits_2ON.grad = torch.zeros_like(logits_2ON)
        optimizer.step()
        optimizer.zero_grad()
        total += add_up(losses) / len(batches)
    return total


def _mean_square(outputs_BTD: Tensor, targets_BTD: Tensor) -> Tensor:
    """The mean squared error, in float32."""
    return (outputs_BTD.float() - targets_BTD.float()).square().mean()


def start_at(factors: Mapping[str, Tensor]) -> ClippingState:
    """The state before the first epoch in which both ends of every range (O, N) have these factors, at most 0.98."""
    most = torch.tensor(START).sigmoid()
    logits = {name: torch.minimum(factor_ON, most.to(factor_ON)).logit() for name, factor_ON in factors.items()}
    return ClippingState({name: torch.stack([x_ON, x_ON]) for name, x_ON in logits.items()}, {}, {}, torch.empty(0))


def _start(ranges: Mapping[str, Tensor]) -> ClippingState:
    logits = {name: torch.full_like(ends_2ON, START) for name, ends_2ON in ranges.items()}
    return ClippingState(logits, {}, {}, torch.empty(0))


def _optimizer(logits: Mapping[str, Tensor], state: ClippingState, steps: int, rate: float) -> torch.optim.AdamW:
    """AdamW as it stood in `state`, after that many steps in each of its epochs."""
    on_gpu = all(logits_2ON.is_cuda for logits_2ON in logits.values())
    optimizer = torch.optim.AdamW([*logits.values()], rate, weight_decay=0, fused=on_gpu or None)
    if state.epochs:
        moments = {
            place: {
                "step": torch.tensor(float(state.epochs * steps)),
                "exp_avg": state.means[name].clone(),
                "exp_avg_sq": state.squares[name].clone(),
            }
            for place, name in enumerate(logits)
        }
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return optimizer


def _reached(logits: Mapping[str, Tensor], optimizer: torch.optim.AdamW, losses: Tensor) -> ClippingState:
    moments = {name: optimizer.state[logits_2ON] for name, logits_2ON in logits.items()}
    return ClippingState(
        logits={name: logits_2ON.detach().clone() for name, logits_2ON in logits.items()},
        means={name: found["exp_avg"].clone() for name, found in moments.items()},
        squares={name: found["exp_avg_sq"].clone() for name, found in moments.items()},
        losses=losses,
    )


def quantize_learnt(weight_OI: Tensor, number_format: NumberFormat, factors: RangeFactors) -> QuantizedTensor:
    """Round a weight to nearest under its learnt ranges."""
    return quantize_clipped(weight_OI, number_format, factors.low_ON, factors.high_ON)


def _rounded(
    weight_OI: Tensor,
    number_format: NumberFormat,
    ends_2ON: Tensor,
    logits_2ON: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """w_q (O, I): the values of `quantize_learnt`, differentiable in the logits. dtype: computed in float32."""
    assert isinstance(number_format, Int)
    low_ON, high_ON = ends_2ON * logits_2ON.sigmoid()
    if number_format.symmetric:
        step_ON = torch.maximum(-low_ON, high_ON) / number_format.max_code
    else:
        step_ON = (high_ON - low_ON) / number_format.max_code
    step_ON = _through(step_ON, number_format.storable_scales(step_ON.detach()).float())
    if number_format.symmetric:
        zero_ON = torch.zeros_like(step_ON)
    else:
        zero_ON = _through(-low_ON / step_ON, (-low_ON / step_ON).detach().round().clamp(0, number_format.max_code))
    if weight_OI.is_cuda:
        from lqer.transforms.lwc_kernel import FusedRounding

        return FusedRounding.apply(weight_OI.float(), step_ON, zero_ON, number_format, dtype)
    return rounded_under(weight_OI.float(), step_ON, zero_ON, number_format).to(dtype)


def rounded_under(weight_OI: Tensor, step_ON: Tensor, zero_ON: Tensor, number_format: Int) -> Tensor:
    """w_q (O, I) of a float32 weight under scales s and zero points z (O, N), differentiable in both."""
    steps_ONB = to_blocks(weight_OI, number_format.block_size) / step_ON.unsqueeze(-1)
    codes_ONB = _through(steps_ONB, steps_ONB.detach().round()) + zero_ON.unsqueeze(-1)
    codes_ONB = codes_ONB.clamp(number_format.min_code, number_format.max_code)
    return from_blocks((codes_ONB - zero_ON.unsqueeze(-1)) * step_ON.unsqueeze(-1), weight_OI.shape[1])


def _through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of x; exact, since the bracket is 0 going forward."""
    return rounded + (x - x.detach())
