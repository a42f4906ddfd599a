"""Progressive adaptive rounding: TesseraQ's reconstruction of one decoder block (arXiv 2410.19103, algorithm 1).

    v <- h⁻¹(W / s - floor(W / s)),  u <- 0                            for every linear of the block; s and z are frozen
    for f in the fractions of the schedule:
        harden:  the surest weights of every linear are decided; a fraction f of those within the codes stays soft
        soften:  a new Adam on the soft part of v, and on u:           min  E ‖ B(X; w'(v, u)) - Y ‖²
    decide the rest

X are the block's inputs after the quantized blocks before it, Y the outputs of the original block on the original
inputs; a second target, its outputs on X, may be added (the published code's `aug_loss`). The block is any function of
weights and hidden states: this file knows no modules.

Memory: some 40 bytes per weight (v of this round and the last, its gradient, Adam's two moments, w' with its codes and
its gradient, the grid) and the activations of one micro-batch. Inputs and targets may be on another device; they are
fetched one micro-batch at a time.

Shapes: S sequences, B sequences of a batch, T tokens, D hidden size, O out_features, I in_features, N groups of a row,
K steps of a round.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lqer.components import require_choice, require_number, require_positive
from lqer.formats import NumberFormat, QuantizedTensor
from lqer.rounding.base import Rounding, Statistics
from lqer.rounding.batches import Goal, Weights
from lqer.rounding.par_schedule import draw_batches, soft_fractions
from lqer.rounding.soft import Grid, harden


@dataclass(frozen=True)
class AdaptiveState:
    """A reconstruction after a round: everything that the remaining rounds need apart from inputs and targets.

    v: float32 (O, I) per linear. u: float32 (O, N) per linear whose scales are tuned. losses: the mean loss of every
    finished round, float32 (rounds,).
    """

    v: dict[str, Tensor]
    u: dict[str, Tensor]
    losses: Tensor

    @property
    def rounds(self) -> int:
        """How many rounds are finished."""
        return len(self.losses)

    def tensors(self) -> dict[str, Tensor]:
        """All of it under flat names, for a file of tensors."""
        return {
            "losses": self.losses,
            **{f"v.{name}": v_OI for name, v_OI in self.v.items()},
            **{f"u.{name}": u_ON for name, u_ON in self.u.items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], device: torch.device | None = None) -> AdaptiveState:
        """The inverse of `tensors`, on a device."""
        v, u = ({name[2:]: x.to(device) for name, x in tensors.items() if name.startswith(f"{kind}.")} for kind in "vu")
        return cls(v, u, tensors["losses"])


class DivergedError(ArithmeticError):
    """The loss or a rounding variable became NaN or infinite. `state` is the one after the last finite round."""

    def __init__(self, message: str, state: AdaptiveState):
        super().__init__(message)
        self.state = state


def round_block(
    weights: Weights,
    starts: Mapping[str, QuantizedTensor],
    goal: Goal,
    settings: Adaptive,
    seed: int = 0,
    state: AdaptiveState | None = None,
    after_round: Callable[[AdaptiveState], None] = lambda state: None,
) -> dict[str, QuantizedTensor]:
    """Round the weights (O, I) of a block together so that its output stays close to its targets.

    starts: per weight, a quantized tensor in `int` or `mxint` whose scales and zero points are used, and its codes if
    `settings.start` is "codes". seed: of the order of the batches. state: of an earlier run, to resume; `after_round`
    gets the state after every round.

    Returns the weights to store. Their values are exactly those of the last training step with every rounding decided,
    because scales are trained as `int` stores them. Raises DivergedError, and ValueError where weights and starts do
    not fit together.
    """
    if weights.keys() != starts.keys():
        raise ValueError(f"weights {sorted(weights)} and starts {sorted(starts)} are not of the same linears")
    grids = {name: Grid.of(weights[name], starts[name], settings.start == "codes") for name in weights}
    open_weights = {name: int(grid.is_open_OI.sum()) for name, grid in grids.items()}
    state = state or start_state(grids, settings.tune_scales)
    fractions = settings.schedule(starts)
    rounds = len(fractions)
    batches = draw_batches(len(goal.inputs_STD), rounds, settings.steps, settings.batch_size, seed)
    for t in range(state.rounds, rounds):
        v = {name: harden(v_OI, int(fractions[t] * open_weights[name])) for name, v_OI in state.v.items()}
        v, u, loss = _soften(grids, v, state.u, goal, batches[t], settings)
        if not all(torch.isfinite(loss) & ~x.isnan().any() for x in (*v.values(), *u.values())):
            raise DivergedError(f"round {t + 1} of {rounds} diverged: its loss is {float(loss)}", state)
        state = AdaptiveState(v, u, torch.cat([state.losses, loss.reshape(1).cpu()]))
        after_round(state)
    return {name: grid.quantized(state.v[name], state.u.get(name)) for name, grid in grids.items()}


def start_state(grids: Mapping[str, Grid], tune_scales: bool) -> AdaptiveState:
    """The soft weights equal to the original ones, within the grid's range."""
    v = {name: grid.start_v_OI for name, grid in grids.items()}
    u = {
        name: torch.zeros_like(grid.spacing.step_G) for name, grid in grids.items() if tune_scales and grid.tunes_scales
    }
    return AdaptiveState(v, u, torch.empty(0))


def block_loss(outputs_BTD: Tensor, targets_BTD: Tensor) -> Tensor:
    """The squared error summed over the hidden size, averaged over tokens, in float32."""
    return (outputs_BTD.to(torch.float32) - targets_BTD.to(torch.float32)).square().sum(-1).mean()


def _soften(
    grids: Mapping[str, Grid],
    v: dict[str, Tensor],
    u: dict[str, Tensor],
    goal: Goal,
    batches_KB: Tensor,
    settings: Adaptive,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """One round of Adam without synchronizing a GPU: the final variables and the mean loss, NaN if any step has one."""
    v = {name: v_OI.clone().requires_grad_() for name, v_OI in v.items()}
    u = {name: u_ON.clone().requires_grad_() for name, u_ON in u.items()}
    device = next(iter(v.values())).device
    groups: list[dict[str, Any]] = [{"params": [*v.values()], "lr": settings.learning_rate}]
    if u:
        groups.append(
            {"params": [*u.values()], "lr": settings.scale_learning_rate, "weight_decay": settings.scale_decay}
        )
    optimizer = torch.optim.Adam(groups, fused=True)
    total = torch.zeros((), device=device)

    def soft(dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: grid.weight(v[name], u.get(name), dtype) for name, grid in grids.items()}

    for losses in goal.gradients(soft, device, block_loss, [*batches_KB], settings.learning_batch):
        optimizer.step()
        optimizer.zero_grad()
        for loss in losses:
            total += loss
    trained = ({name: x.detach() for name, x in variables.items()} for variables in (v, u))
    return *trained, total / len(batches_KB)  # type: ignore[return-value]


@dataclass(frozen=True)
class Adaptive(Rounding):
    """`adaptive` as a configuration names it: the linears of a block are rounded together.

    The defaults are the published ones. start: "weights" begins at the weights themselves under the scales that
    transforms have found, "codes" as near to them as the codes that transforms have found allow. both_targets: adds the
    loss against the original block's output on the same inputs. steps: of Adam in a round. batch_size: sequences of a
    step. micro_batch: sequences in one forward pass, by default all of a step; it bounds the memory and changes the
    result only by the order of summation. scale_decay: L2 decay of u. soft_fractions: per round, the fraction that
    stays soft of every layer's weights within the codes; by default the published schedule for the weights' bits.
    """

    kind = "adaptive"
    together: ClassVar[bool] = True
    keeps_scales: ClassVar[bool] = True
    learning_bytes: ClassVar[int] = 40

    start: Literal["weights", "codes"] = "weights"
    both_targets: bool = False
    steps: int = 250
    batch_size: int = 4
    micro_batch: int | None = None
    learning_rate: float = 1e-3
    tune_scales: bool = True
    scale_learning_rate: float = 1e-3
    scale_decay: float = 1e-4
    soft_fractions: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for key in ("learning_rate", "scale_learning_rate", "scale_decay"):
            require_number(key, getattr(self, key), self.kind)
        for key in ("steps", "batch_size") if self.micro_batch is None else ("steps", "batch_size", "micro_batch"):
            require_positive(key, getattr(self, key), self.kind)
        require_choice("start", self.start, ["weights", "codes"], self.kind)
        for key in ("both_targets", "tune_scales"):
            require_choice(key, getattr(self, key), [False, True], self.kind)
        if self.soft_fractions is not None:
            fractions = self.soft_fractions
            if not isinstance(fractions, list | tuple) or not all(isinstance(one, int | float) for one in fractions):
                raise ValueError(f"soft_fractions {fractions!r} is not a list of numbers (adaptive)")
            if not fractions or any(later >= earlier for earlier, later in itertools.pairwise([1, *fractions, 0])):
                raise ValueError(f"soft_fractions {fractions} do not fall strictly between 1 and 0 (adaptive)")
            object.__setattr__(self, "soft_fractions", tuple(fractions))

    @property
    def learning_batch(self) -> int:
        return self.micro_batch or self.batch_size

    def schedule(self, starts: Mapping[str, QuantizedTensor]) -> tuple[float, ...]:
        """The soft fractions of a block that starts at these quantized weights; the narrowest ones decide."""
        return self.soft_fractions or soft_fractions(min(one.format.stream_widths["codes"] for one in starts.values()))

    def round(self, weight_OI: Tensor, statistics: Statistics, number_format: NumberFormat) -> QuantizedTensor:
        """The start of the reconstruction: a weight without its block is rounded to nearest."""
        return number_format.quantize(weight_OI)

    def unsupported_reason(self, number_format: NumberFormat) -> str | None:
        if number_format.kind not in ("int", "mxint"):
            return "adaptive rounding needs weights of kind int or mxint"
        if number_format.block_size == "tensor":
            return 'adaptive rounding learns a scale per row or block of a weight: block_size must not be "tensor"'
        return None
