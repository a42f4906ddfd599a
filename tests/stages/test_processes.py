"""Processes of this machine: interrupts that come while one is started, and what one leaves that is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lqer.stages.processes import held_back_interrupts

pytestmark = pytest.mark.usefixtures("heard_interrupts")

SHOWS_A_BAR_AND_IS_KILLED = """
import os
import time

from tqdm import tqdm

from lqer.stages.processes import processes


def show(connection):
    with tqdm(total=2, file=open(os.devnull, "w")):
        connection.send(os.getpid())
        time.sleep(600)


if __name__ == "__main__":
    context = processes([])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=show, args=(theirs,))
    process.start()
    assert ours.recv() == process.pid
    process.kill()
    process.join()
    print(process.exitcode)
"""


def started(is_interrupted: bool, breaks: bool, reached: list[str]) -> None:
    with held_back_interrupts():
        if is_interrupted:
            signal.raise_signal(signal.SIGINT)
        if breaks:
            raise EOFError("unexpected EOF")
        reached.append("the end")


def test_an_interrupt_is_raised_when_the_process_is_held():
    reached: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        started(is_interrupted=True, breaks=False, reached=reached)
    assert reached == ["the end"]


def test_an_interrupt_that_broke_the_start_is_an_interrupt_and_no_error():
    """Ctrl-C at a terminal ends the process in the middle of its imports too, and the start fails by that."""
    with pytest.raises(KeyboardInterrupt):
        started(is_interrupted=True, breaks=True, reached=[])


def test_an_interrupt_that_a_process_in_the_background_ignores_is_ignored_there_too():
    reached: list[str] = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    started(is_interrupted=True, breaks=False, reached=reached)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert reached == ["the end"]


def test_a_start_that_fails_by_itself_is_an_error():
    with pytest.raises(EOFError, match="unexpected"):
        started(is_interrupted=False, breaks=True, reached=[])


def test_one_that_is_killed_while_it_shows_a_bar_leaves_no_semaphore_to_tell_of(tmp_path):
    script = tmp_path / "shows.py"
    script.write_text(SHOWS_A_BAR_AND_IS_KILLED)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.stderr) == (f"{-signal.SIGKILL}\n", "")
