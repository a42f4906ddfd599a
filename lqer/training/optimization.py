"""The optimizer of fine-tuning, its schedule, and the history of the held-out loss.

warm-up over a fraction of the steps, then linear decay to 0, in AdamW; weight decay pulls relative parameters to 0,
that is, tensors to where they started
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lqer.config.schema import TrainingConfig
from lqer.training.parts import learning_rates
from lqer.training.trained import Trained


class Training:
    """Parameters, optimizer and history: the state at the start of an epoch, saved in `training-*.safetensors`."""

    def __init__(self, trained: Mapping[str, Trained], settings: TrainingConfig, steps_per_epoch: int):
        self.parameters = {name: one.parameter for name, one in trained.items()}
        groups = [
            {"params": [one.parameter for one in trained.values() if one.kind == kind], "lr": rate}
            for kind, rate in learning_rates(settings).items()
        ]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=settings.weight_decay)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.steps = steps_per_epoch * settings.epochs
        self.warmup_steps = int(settings.warmup * self.steps)
        self.best = self._copy()
        self.losses: list[float] = []

    def _copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @property
    def best_epoch(self) -> int:
        return min(range(len(self.losses)), key=lambda epoch: self.losses[epoch])

    def record(self, loss: float) -> None:
        """Append a validation loss, and copy the parameters if it is the lowest so far."""
        self.losses.append(loss)
        if self.best_epoch == len(self.losses) - 1:
            self.best = self._copy()

    def step(self, loss: Tensor, step: int) -> None:
        """One optimizer step; the learning rate rises linearly over the warm-up, then falls linearly to 0."""
        rising, falling = (step + 1) / (self.warmup_steps + 1), (self.steps - step) / (self.steps - self.warmup_steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * min(rising, falling)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """All of it under flat names, for a file of tensors."""
        kept = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for name, parameter in self.parameters.items():
            kept |= {f"now.{name}": parameter, f"best.{name}": self.best[name]}
            kept |= {f"{key}.{name}": value for key, value in self.optimizer.state.get(parameter, {}).items()}
        return kept

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave, on any device."""
        self.losses = kept["losses"].tolist()
        for name, parameter in self.parameters.items():
            parameter.data.copy_(kept[f"now.{name}"])
            self.best[name] = kept[f"best.{name}"].to(parameter.device)
            if f"step.{name}" in kept:
                state = {key: kept[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {
                    "step": kept[f"step.{name}"], **{key: value.to(parameter.device) for key, value in state.items()}
                }  # fmt: skip
