"""Float64 memory of a site's factor, counted on tensors without storage.

Counted are the tensors that the code makes; what a library's factorization needs besides is measured by
experiments/benchmark_statistics.py.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lqer.lowrank.metric import Metric
from lqer.rounding.factor import feedback_factor, vector_feedback
from lqer.rounding.hessian import DampedHessian
from lqer.rounding.ldlq import block_lower

# Of a GPU with 80 GB, next to the largest block of a model of 405B parameters and the other statistics of the block.
ROOM = 80e9 - 6.4e9 - 4e9


class Memory(TorchDispatchMode):
    """Bytes of all storages that are alive, at most. Numbers that are read of tensors are 0: nothing is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self.now = 0
        self._users: Counter[int] = Counter()
        self._seen: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.aten._local_scalar_dense.default:
            return 0
        if operator is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            # To read several numbers at once.
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype"))
        found = operator(*args, **kwargs or {})
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor not in self._seen:
                self._enter(tensor)
        return found

    def _enter(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._seen[tensor] = Use(self, storage._cdata, storage.nbytes())

    def begin(self, storage: int, size: int) -> None:
        self._users[storage] += 1
        self.now += size * (self._users[storage] == 1)
        self.most = max(self.most, self.now)

    def end(self, storage: int, size: int) -> None:
        self._users[storage] -= 1
        self.now -= size * (self._users[storage] == 0)


class Use:
    """A tensor's use of its storage, which ends with the tensor."""

    def __init__(self, memory: Memory, storage: int, size: int):
        self._of = memory, storage, size
        memory.begin(storage, size)

    def __del__(self) -> None:
        memory, *of = self._of
        memory.end(*of)


def statistic(size: int) -> torch.Tensor:
    return torch.empty(size, size, device="meta")


def gptq(hessian_II):
    return DampedHessian(hessian_II).derived(feedback_factor, False)


def gptq_in_order(hessian_II):
    return DampedHessian(hessian_II).derived(feedback_factor, True)


def gptvq(hessian_II):
    return DampedHessian(hessian_II).derived(vector_feedback, 2)


def ldlq(hessian_II):
    return block_lower(DampedHessian(hessian_II).cholesky_II, 8, torch.float32)


def qera(hessian_II):
    return Metric(hessian_II=hessian_II / hessian_II.diagonal().mean()).times(hessian_II[:, :64])


@pytest.mark.parametrize("size", [28672, 53248])
@pytest.mark.parametrize("step", [gptq, gptq_in_order, gptvq, ldlq, qera])
def test_one_matrix_of_float64_and_one_of_float32_exist_at_once_beside_the_statistic(step, size):
    with Memory() as memory:
        kept = step(statistic(size))
    # The statistic and what is kept are float32; panels and vectors are small beside a matrix.
    assert memory.most - 4 * size**2 <= 1.6 * 8 * size**2
    assert memory.most < ROOM
    assert kept is not None


def test_the_count_is_that_of_what_is_alive():
    with Memory() as memory:
        x = torch.empty(10, 10, device="meta")
        y = x.T[2:] + 1
        del x
        z = torch.empty(5, device="meta", dtype=torch.float64).mul_(2)
        del y
        assert memory.now == z.nbytes == 40
    assert memory.most == 400 + 320
