"""Schedules of jobs: order, failure, loss."""

from __future__ import annotations

from lqer.jobs.graph import Job, Schedule


def job(name: str, *needs: str, seconds: float = 1.0) -> Job:
    return Job(name, (), needs, lambda store: None, seconds)


def diamond(**options) -> Schedule:
    return Schedule([job("top"), job("left", "top"), job("right", "top"), job("end", "left", "right")], **options)


def worked_through(schedule: Schedule) -> list[str]:
    order = []
    while not schedule.is_over:
        name = schedule.ready()[0]
        schedule.start(name)
        schedule.finish(name)
        order.append(name)
    return order


def test_a_job_starts_when_all_that_it_needs_is_done():
    schedule = diamond()
    assert schedule.ready() == ["top"]
    schedule.start("top")
    assert schedule.ready() == []
    schedule.finish("top")
    assert schedule.ready() == ["left", "right"]
    schedule.start("left")
    schedule.finish("left")
    assert schedule.ready() == ["right"]


def test_what_is_done_before_is_not_run_again():
    assert worked_through(diamond(done=["top", "left"])) == ["right", "end"]


def test_jobs_of_equal_name_are_one():
    schedule = Schedule([job("shared"), job("one", "shared"), job("shared"), job("two", "shared")])
    assert worked_through(schedule) == ["shared", "one", "two"]


def test_a_job_that_more_others_wait_for_comes_first():
    assert Schedule([job("alone"), job("first"), job("then", "first"), job("last", "then")]).ready() == [
        "first",
        "alone",
    ]


def test_a_job_that_takes_longer_with_all_that_waits_for_it_comes_first():
    jobs = [
        job("short", seconds=2.0), job("long", seconds=9.0), job("first", seconds=1.0),
        job("then", "first", seconds=9.5), job("meanwhile", "first", seconds=3.0),
    ]  # fmt: skip
    assert Schedule(jobs).ready() == ["first", "long", "short"]
    assert Schedule(jobs, done=["first"]).ready() == ["then", "long", "meanwhile", "short"]


def test_a_failure_fails_what_needs_it_with_its_line_and_nothing_else():
    schedule = Schedule([job("bad"), job("needs it", "bad"), job("needs that", "needs it"), job("other")])
    schedule.start("bad")
    schedule.fail("bad", "its line")
    assert schedule.failed == {"bad": "its line", "needs it": "its line", "needs that": "its line"}
    assert worked_through(schedule) == ["other"]


def test_nothing_starts_after_a_failure_where_that_is_asked_for():
    schedule = Schedule([job("bad"), job("other")], stops_at_failure=True)
    schedule.start("bad")
    schedule.fail("bad", "its line")
    assert schedule.is_over


def test_a_job_whose_worker_was_lost_is_ready_again():
    schedule = diamond()
    schedule.start("top")
    assert not schedule.is_over
    schedule.again("top")
    assert schedule.ready() == ["top"]


def early(**options) -> Schedule:
    """Two parts, each of which reads a file of what the first job makes, and what needs all of it."""
    parts = [Job(f"part {file}", (), ("first",), lambda store: None, enough={"first": (file,)}) for file in "ab"]
    return Schedule([job("first"), *parts, job("whole", "first", *(one.name for one in parts))], **options)


def test_a_job_starts_once_the_files_that_it_reads_are_there():
    schedule = early()
    schedule.start("first")
    assert schedule.ready() == []
    assert schedule.awaited() == {"first"}
    schedule.see("first", ["a", "another"])
    assert schedule.ready() == ["part a"]
    schedule.start("part a")
    schedule.finish("part a")
    assert schedule.ready() == []
    schedule.see("first", ["a", "b"])
    assert schedule.ready() == ["part b"]
    assert schedule.awaited() == set()


def test_files_that_were_there_before_let_a_job_start_beside_the_one_that_makes_the_rest():
    schedule = early()
    schedule.see("first", ["b"])
    assert schedule.ready() == ["first", "part b"]


def test_a_job_that_reads_a_file_needs_no_look_once_all_are_made():
    schedule = early(done=["first"])
    assert schedule.awaited() == set()
    assert schedule.ready() == ["part a", "part b"]


def test_a_job_that_has_all_that_it_reads_does_not_fail_with_the_one_that_makes_the_rest():
    schedule = early()
    schedule.see("first", ["a", "b"])
    for name in ("first", "part a", "part b"):
        schedule.start(name)
    schedule.finish("part a")
    schedule.fail("first", "its line")
    assert not schedule.is_over
    schedule.finish("part b")
    assert schedule.is_over
    assert schedule.done == {"part a", "part b"}
    assert schedule.failed == {"first": "its line", "whole": "its line"}


def test_a_job_that_waits_for_a_file_fails_with_the_one_that_makes_it():
    schedule = early()
    schedule.start("first")
    schedule.fail("first", "its line")
    assert schedule.failed.keys() == {"first", "part a", "part b", "whole"}
