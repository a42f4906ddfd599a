"""Stages that several processes of one machine build together, each with a GPU of its own.

The process that builds the stage is the first rank; it alone writes. For each stage it starts the others, which are
given the stage itself, read what it reads, and end with it. If one of them ends before that, all do, with one line.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import tempfile
import threading
import traceback
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lqer.errors import LostProcessError, LqerError, RunFailedError
from lqer.stages.base import Stage, no_effect
from lqer.stages.processes import death, expect_processes, held_back_interrupts, processes
from lqer.statistics import ALONE, Gang
from lqer.store.onlooker import Onlooker
from lqer.store.store import Store, partial_path
from lqer.store.workspace import Workspace

log = logging.getLogger(__name__)

# For one rank to end after another.
SECONDS_TO_END = 30.0
# What every rank imports, which takes seconds.
PRELOADED = ("lqer.stages.quantize_sequential",)
# Exit status of a rank that ended because another had.
EXIT_LOST = 3


class RankFailedError(Exception):
    """Another rank failed with an exception that no input explains; its traceback follows the first line."""


@dataclass(frozen=True)
class GangStage(Stage):
    """ranks: how many processes build it at most."""

    ranks: int = field(
        default=1, kw_only=True, metadata=no_effect("what ranks have found is added up in the order of the windows")
    )

    @abstractmethod
    def build_together(self, workspace: Workspace, store: Store, gang: Gang) -> Callable[[], object]:
        """`build` as one rank of a gang. Returns what the first rank does at the end, alone."""

    def build_by_ranks(self, workspace: Workspace, store: Store, device: torch.device, most: int) -> None:
        """Build it on GPUs like `device`, with no more than `most` ranks."""
        with gang_of(self, store, device, min(self.ranks, most)) as gang:
            finish = self.build_together(workspace, store, gang)
        finish()


def expect_gang() -> None:
    """Let the import of the other ranks begin, which then need not wait for it when a stage starts them."""
    expect_processes(PRELOADED)


class _Meeting(NamedTuple):
    """What the ranks of a gang know of each other. file: where they find each other."""

    size: int
    file: Path
    device: torch.device
    store: Path
    folder: Path
    threads: int


class _Rank(NamedTuple):
    """Another rank. connection: None comes when it is about to join, an LqerError or a traceback when it fails."""

    process: BaseProcess
    connection: Connection


@contextmanager
def gang_of(stage: GangStage, store: Store, device: torch.device, size: int) -> Iterator[Gang]:
    """The gang that builds a stage, of which this process is the first rank; the others build it meanwhile.

    Raises the LqerError of a rank, LostProcessError with one line where a rank was killed, else RankFailedError.
    """
    if size == 1:
        yield ALONE
        return
    from lqer.stages.ranks import LostRankError, joined

    with tempfile.TemporaryDirectory(prefix="lqer-gang-") as folder:
        file = Path(folder) / "meeting"
        meeting = _Meeting(size, file, device, store.root.absolute(), Path.cwd(), torch.get_num_threads())
        others = _start(stage, meeting)
        log.info("%s: %d processes together", stage.log_name, size)
        try:
            # One that fails before it joins would be waited for.
            if not all(_is_ready(rank) for rank in others):
                raise LostRankError
            with joined(0, size, file, device) as gang:
                yield gang
            for rank in others:
                rank.process.join()
        except LostRankError:
            raise _reason(stage, others) from None
        finally:
            for rank in others:
                rank.process.terminate()
                rank.process.join()
                rank.connection.close()


def _start(stage: GangStage, meeting: _Meeting) -> list[_Rank]:
    context: Any = processes(PRELOADED)
    started: list[_Rank] = []
    for number in range(1, meeting.size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(number, stage, meeting, theirs), daemon=True)
        with held_back_interrupts():
            process.start()
        theirs.close()
        started.append(_Rank(process, ours))
    return started


def _is_ready(rank: _Rank) -> bool:
    """Whether it is about to join; waits until it is, or has ended."""
    try:
        return rank.connection.poll(None) and rank.connection.recv() is None
    except EOFError:
        return False


def _reason(stage: GangStage, others: list[_Rank]) -> Exception:
    """Why the gang ended: because of the first rank that ended for a reason of its own."""
    waiting = dict(enumerate(others, 2))
    while ended := wait([rank.process.sentinel for rank in waiting.values()], SECONDS_TO_END):
        for number, rank in [item for item in waiting.items() if item[1].process.sentinel in ended]:
            del waiting[number]
            rank.process.join()
            name, failure = f"{stage.log_name}: process {number} of {len(others) + 1}", _failure(rank.connection)
            if isinstance(failure, LqerError):
                return failure
            if failure is not None:
                return RankFailedError(f"{name}: {failure}")
            exitcode = rank.process.exitcode
            if exitcode != EXIT_LOST:
                kind = LostProcessError if exitcode is not None and exitcode < 0 else RunFailedError
                return kind(f"{name} {death(exitcode)}; the same command goes on from there")
    return LostProcessError(f"{stage.log_name}: the {len(others) + 1} processes lost their connection to each other")


def _failure(connection: Connection) -> LqerError | str | None:
    """What a rank has sent of its failure; None if nothing."""
    failure: LqerError | str | None = None
    try:
        while connection.poll():
            failure = connection.recv() or failure
    except EOFError:
        pass
    return failure


def _end_with_the_first() -> None:
    """In another rank: end at once if the first one is killed, whatever this one is at, and leave the GPU to others."""
    first = multiprocessing.parent_process()
    assert first is not None, "the first rank starts the others"
    first.join()
    os._exit(EXIT_LOST)


def _work(number: int, stage: GangStage, meeting: _Meeting, connection: Connection) -> None:
    """Another rank than the first, in a process of its own."""
    from lqer.stages.ranks import LostRankError, joined

    threading.Thread(target=_end_with_the_first, daemon=True).start()
    # Bars, logs and warnings are those of the first rank.
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (open as long as the process)
    try:
        os.chdir(meeting.folder)
        # Sums within a product may depend on the number of threads.
        torch.set_num_threads(meeting.threads)
        if meeting.device.type == "cuda":
            torch.cuda.set_device(number % torch.cuda.device_count())
        store = Store(meeting.store)
        workspace = Onlooker(partial_path(store.path(stage.name, stage.key)))
        connection.send(None)
        with joined(number, meeting.size, meeting.file, meeting.device) as gang:
            stage.build_together(workspace, store, gang)
    except LostRankError:
        os._exit(EXIT_LOST)
    except LqerError as error:
        connection.send(error)
        os._exit(1)
    except Exception as error:
        connection.send("\n".join([f"{type(error).__name__}: {error}", traceback.format_exc()]))
        # Not through the interpreter's own end, which might wait for the other ranks.
        os._exit(1)
