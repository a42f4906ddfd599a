"""Stages that do nothing but exchange, for tests of gangs: other processes must be able to import them by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lqer.errors import ModelError
from lqer.stages.gang import GangStage
from lqer.statistics import Gang
from lqer.store.store import Store, Workspace

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Exchange(GangStage):
    """Every primitive on values from which the ranks can be told apart."""

    name: ClassVar[str] = "exchange"
    version: ClassVar[int] = 1

    values: Tensor
    most: int = 3

    def build(self, workspace: Workspace, store: Store) -> None:
        self.build_by_ranks(workspace, store, CPU, self.most)

    def build_together(self, workspace: Workspace, store: Store, gang: Gang) -> Callable[[], object]:
        rank = gang.rank
        tensors = {"half": torch.full([2], rank, dtype=torch.bfloat16), "empty": torch.empty(0, rank)}
        gathered = gang.gathered((tensors, [f"r{rank}", rank], {rank}))
        ours = torch.stack([*gang.share(self.values)])
        leaf, unused = torch.zeros(3).requires_grad_(), torch.zeros(1).requires_grad_()

        def backward(item: Tensor) -> Tensor:
            # Only for some of the items there is a second gradient.
            loss = (leaf * item).sum() + (unused.sum() if item[0] > 0 else 0)
            loss.backward()
            return item.sum()

        losses = gang.add_gradients(self.values, backward, [leaf, unused])
        taken: list[float] = []
        gang.collect(
            self.values, lambda item, found: [found(float(x)) for x in item], lambda x: taken.append(round(x, 3))
        )
        results = {
            "half": torch.stack([found["half"] for found, *_ in gathered]),
            "joined": gang.joined(ours),
            "first": gang.of_first(torch.tensor(rank + 1.0)),
            "total": gang.sum_(ours.double().sum(0).clone()),
            "each": torch.stack([*gang.each(self.values, lambda item: item.square())]),
            "gradient": leaf.grad,
            "other": unused.grad,
            "losses": torch.stack(losses),
            "taken": torch.tensor(taken),
        }
        workspace.write_tensors("results.safetensors", results)
        described = [[list(found["empty"].shape), plain, sorted(others)] for found, plain, others in gathered]
        workspace.write_json("gathered.json", described)
        return lambda: workspace.write_json("finished.json", rank)


@dataclass(frozen=True)
class Failing(GangStage):
    name: ClassVar[str] = "failing"
    version: ClassVar[int] = 1

    at: int
    by_input: bool

    def build(self, workspace: Workspace, store: Store) -> None:
        self.build_by_ranks(workspace, store, CPU, 3)

    def build_together(self, workspace: Workspace, store: Store, gang: Gang) -> Callable[[], object]:
        gang.gathered(0)
        if gang.rank == self.at:
            raise ModelError("layer 3: is not finite") if self.by_input else ValueError("this was not foreseen")
        gang.gathered(1)
        return lambda: None


@dataclass(frozen=True)
class Busy(GangStage):
    """All ranks are at work of their own, and leave their process ids in `folder`, when the first one is killed."""

    name: ClassVar[str] = "busy"
    version: ClassVar[int] = 1

    folder: str

    def build(self, workspace: Workspace, store: Store) -> None:
        self.build_by_ranks(workspace, store, CPU, 3)

    def build_together(self, workspace: Workspace, store: Store, gang: Gang) -> Callable[[], object]:
        (Path(self.folder) / str(os.getpid())).touch()
        gang.gathered(0)
        if gang.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
        return lambda: None
