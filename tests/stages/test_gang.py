"""Ranks of a gang: what they exchange, and what becomes of one that fails."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from gang_stages import Exchange, Failing
from torch import Tensor

from lqer.errors import ModelError
from lqer.stages.gang import RankFailedError
from lqer.store.store import Store

# Where the program of a test finds gang_stages.
COMMON = Path(__file__).parents[1] / "common"


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


def test_ranks_end_with_the_first_one_whatever_they_are_at(tmp_path):
    """Else they would hold their GPUs, while another process does the same work again."""
    program = (
        "import sys; from gang_stages import Busy; from lqer.store.store import Store; from pathlib import Path; "
        "Busy(sys.argv[1], ranks=3).obtain(Store(Path(sys.argv[1]) / 'store'))"
    )
    pids = tmp_path / "pids"
    pids.mkdir()
    first = subprocess.run([sys.executable, "-c", program, str(pids)], cwd=COMMON, check=False)
    assert first.returncode == -signal.SIGKILL
    left = [int(path.name) for path in pids.iterdir() if path.name.isdigit()]
    assert len(left) == 3
    ranks = []
    for pid in left:
        # It may have ended by now.
        with suppress(psutil.NoSuchProcess):
            ranks.append(psutil.Process(pid))
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive
