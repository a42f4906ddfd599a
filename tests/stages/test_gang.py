"""Ranks of a gang: what they exchange, and what becomes of one that fails. The stages here do nothing else."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from lqer.errors import ModelError
from lqer.stages.gang import GangStage, RankFailedError
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


@pytest.fixture(scope="module")
def values() -> Tensor:
    return torch.randn(7, 3, generator=torch.Generator().manual_seed(0))


def test_ranks_exchange_what_one_process_has(tmp_path, values):
    alone = Exchange(values).obtain(Store(tmp_path / "alone")).tensors("results.safetensors")
    for ranks in (2, 3):
        artifact = Exchange(values, ranks=ranks).obtain(Store(tmp_path / str(ranks)))
        found = artifact.tensors("results.safetensors")
        assert found.pop("half").tolist() == [[rank] * 2 for rank in range(ranks)]
        for name, tensor in found.items():
            # The values are float32: their sums in float64 are exact.
            assert torch.equal(tensor, alone[name]), name
        assert artifact.json("gathered.json") == [[[0, rank], [f"r{rank}", rank], [rank]] for rank in range(ranks)]
        assert artifact.json("finished.json") == 0


def test_ranks_are_not_more_than_there_is_work_for_and_no_part_of_the_name(tmp_path, values):
    assert Exchange(values, ranks=3).identity == Exchange(values).identity
    artifact = Exchange(values, most=1, ranks=3).obtain(Store(tmp_path))
    assert len(artifact.json("gathered.json")) == 1


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_error_in_the_input_is_that_of_the_rank_that_found_it(tmp_path, at):
    with pytest.raises(ModelError, match=r"^layer 3: is not finite$"):
        Failing(at, by_input=True, ranks=3).obtain(Store(tmp_path))
    assert not multiprocessing.active_children()


def test_an_unforeseen_error_is_told_with_the_traceback_of_its_rank(tmp_path):
    with pytest.raises(RankFailedError) as caught:
        Failing(2, by_input=False, ranks=3).obtain(Store(tmp_path))
    first, *others = str(caught.value).splitlines()
    assert first == "failing: process 3 of 3: ValueError: this was not foreseen"
    assert any("in build_together" in line for line in others)
