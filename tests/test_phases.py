"""Phases count every second once, by thread, and cost nothing while nobody records them."""

from __future__ import annotations

import threading
import time

import pytest

from lqer import phases
from lqer.phases import Recorder, in_phase, phase, recorded

TICK = 0.02


def test_a_phase_inside_another_interrupts_it():
    with recorded(recorder := Recorder()):
        with phase("outer"):
            time.sleep(TICK)
            with phase("inner"):
                time.sleep(3 * TICK)
            time.sleep(TICK)
        started = time.perf_counter()
        with phase("inner"):
            pass
    assert 2 * TICK <= recorder.main["outer"] < 3 * TICK
    assert 3 * TICK <= recorder.main["inner"] < 5 * TICK
    assert time.perf_counter() - started < TICK
    assert not recorder.background


def test_other_threads_are_counted_apart_and_do_not_wait_for_the_gpu():
    waited: list[str] = []

    @in_phase("write")
    def write() -> None:
        time.sleep(TICK)

    with recorded(recorder := Recorder(lambda: waited.append(threading.current_thread().name))):
        thread = threading.Thread(target=write)
        thread.start()
        with phase("round"):
            thread.join()
    assert recorder.background["write"] >= TICK
    assert recorder.main.keys() == {"round"}
    assert waited == ["MainThread"] * 2


def test_a_phase_that_fails_is_closed():
    with recorded(recorder := Recorder()), phase("outer"):
        with pytest.raises(ValueError, match="broken"), phase("inner"):
            raise ValueError("broken")
        time.sleep(TICK)
    assert recorder.main["outer"] >= TICK > recorder.main["inner"]


def test_without_a_recorder_nothing_is_made():
    assert phase("read") is phase("write")
    with recorded(Recorder()):
        assert phase("read") is not phase("read")
    assert phases._recorder is None
