"""The jobs of a run: what each needs, what runs share, and what a half-filled store leaves to do."""

from __future__ import annotations

import pytest

from lqer.config import read_config
from lqer.jobs.graph import Schedule
from lqer.jobs.here import run_here
from lqer.run.chunks import Chunk
from lqer.run.jobs import RunJobs, jobs_of
from lqer.run.preflight import CheckedRun, check_run


def checked(experiment, *overrides: str) -> CheckedRun:
    return check_run(read_config(experiment.config, None, overrides), lambda line: None)


def jobs(run: CheckedRun, chunks=()) -> RunJobs:
    return jobs_of(run.experiment, run.context.summary.blocks, chunks)


def stages(names) -> list[str]:
    return [name.split("-")[0] for name in names]


def test_a_job_stands_after_those_it_needs(undisturbed):
    found = list(jobs(checked(undisturbed)))
    seen: set[str] = set()
    for job in found:
        assert seen.issuperset(job.needs)
        seen.add(job.name)
    assert stages(job.name for job in found) == ["calibrate", "quantize", "quantize", *["evaluate"] * 3]


def test_evaluations_need_the_model_that_they_measure(undisturbed):
    found = jobs(checked(undisturbed))
    quantized, rtn, original = found.measuring
    assert quantized.needs == (found.quantizing[0].name,)
    assert rtn.needs == (found.quantizing[1].name,)
    assert original.needs == ()


def test_all_texts_of_a_model_are_one_job(undisturbed):
    text = undisturbed.folder / "evaluation.txt"
    datasets = f'--evaluation.perplexity.datasets=["{text}", {{ path = "{text}", rows = ":50%" }}]'
    quantized, rtn, original = jobs(checked(undisturbed, datasets)).measuring
    assert [len(job.produces) for job in (quantized, rtn, original)] == [2, 2, 2]


def test_a_divergence_needs_the_originals_distributions(undisturbed):
    found = jobs(checked(undisturbed, "--evaluation.divergence.top_k=8", '--evaluation.baselines=["original"]'))
    original, quantized = found.measuring
    assert quantized.needs == (found.quantizing[0].name, original.name)


def test_a_checkpoint_in_parts_is_whole_after_all_of_them(undisturbed):
    chunks = [Chunk(1, 2), Chunk(2, 2)]
    found = jobs(checked(undisturbed), chunks)
    first, second, whole = found.quantizing[:3]
    assert {first.name, second.name} <= set(whole.needs)
    assert first.needs == second.needs == (found.preparing[0].name,)
    alone = jobs(checked(undisturbed), chunks[:1])
    assert [job.name for job in alone.quantizing[:1]] == [first.name]
    assert whole.name not in [job.name for job in alone]


@pytest.mark.parametrize("override", ["--quantize.propagate_error=true", "--quantize.method=gptq"])
def test_a_checkpoint_whose_blocks_follow_each_other_has_no_parts(undisturbed, override):
    more = ["--quantize.low_rank.rank=0", "--evaluation.baselines=[]"] if "gptq" in override else []
    found = jobs(checked(undisturbed, override, *more), [Chunk(1, 2), Chunk(2, 2)])
    assert all(" " not in job.name for job in found)


def test_runs_share_the_jobs_of_what_they_have_in_common(undisturbed):
    one = jobs(checked(undisturbed, "--evaluation.baselines=[]"))
    other = jobs(checked(undisturbed, "--evaluation.baselines=[]", "--quantize.weight=w3"))
    shared = {job.name for job in one} & {job.name for job in other}
    assert stages(shared) == ["calibrate"]


def test_the_store_says_which_jobs_are_left(experiment):
    run = checked(experiment, "--evaluation.baselines=[]")
    found = jobs(run)
    run_here(found.preparing, run.store)
    schedule = Schedule(found, [job.name for job in found if job.is_done(run.store)])
    assert stages(schedule.ready()) == ["quantize"]
    run_here(found, run.store)
    assert all(job.is_done(run.store) for job in found)
