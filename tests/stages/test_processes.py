"""Interrupts that come while a process is started."""

from __future__ import annotations

import signal

import pytest

from lqer.stages.processes import held_back_interrupts


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


def test_a_start_that_fails_by_itself_is_an_error():
    with pytest.raises(EOFError, match="unexpected"):
        started(is_interrupted=False, breaks=True, reached=[])
