"""Phases count every second once, by thread, and cost nothing while nobody records them."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from lqer import phases
from lqer.phases import Recorder, in_phase, phase, recorded


@pytest.fixture
def clock(monkeypatch):
    """The clock of phases, which stands still until a test sets `now`, in seconds."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(phases, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_a_phase_inside_another_interrupts_it(clock):
    with recorded(recorder := Recorder()):
        with phase("outer"):
            clock.now += 1
            with phase("inner"):
                clock.now += 30
            clock.now += 2
        clock.now += 400  # between two phases: nobody's
        with phase("inner"):
            clock.now += 5
    assert recorder.main == {"outer": 3, "inner": 35}
    assert not recorder.background


def test_other_threads_are_counted_apart_and_do_not_wait_for_the_gpu(clock):
    waited: list[str] = []

    @in_phase("write")
    def write() -> None:
        clock.now += 7

    with recorded(recorder := Recorder(lambda: waited.append(threading.current_thread().name))):
        thread = threading.Thread(target=write)
        with phase("round"):
            thread.start()
            thread.join()
    assert recorder.background == {"write": 7}
    assert recorder.main == {"round": 7}
    assert waited == ["MainThread"] * 2


def test_a_phase_that_fails_is_closed(clock):
    @in_phase("inner")
    def fail() -> None:
        clock.now += 1
        raise ValueError("broken")

    with recorded(recorder := Recorder()), phase("outer"):
        with pytest.raises(ValueError, match="broken"):
            fail()
        clock.now += 2
    assert recorder.main == {"inner": 1, "outer": 2}


def test_without_a_recorder_nothing_is_made():
    assert phase("read") is phase("write")
    with recorded(Recorder()):
        assert phase("read") is not phase("read")
    assert phases._recorder is None
