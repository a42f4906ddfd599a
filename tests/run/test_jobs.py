"""The jobs of a run: what each needs, what runs share, and what a half-filled store leaves to do."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from killing import KilledError, dying_workspace
from stored_files import stored

from lqer.config import read_config
from lqer.evaluation import requests
from lqer.jobs.graph import Job, Progress, Schedule
from lqer.jobs.here import run_here
from lqer.run.chunks import Chunk
from lqer.run.jobs import RunJobs, jobs_of
from lqer.run.preflight import CheckedRun, check_run
from lqer.stages import evaluate
from lqer.stages.calibrate import files_of
from lqer.store import store
from lqer.store.names import block_file
from lqer.store.records import MANIFEST


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


def test_what_one_job_makes_of_all_blocks_is_shown_block_by_block(undisturbed):
    found = jobs(checked(undisturbed, "--evaluation.baselines=[]"))
    shown = [job.progress for job in (*found.preparing, *found.quantizing)]
    assert shown == [Progress(name, "block", 4, counted="block-") for name in ("calibrate", "quantize")]
    parts = jobs(checked(undisturbed, "--evaluation.baselines=[]"), [Chunk(1, 2), Chunk(2, 2)]).quantizing
    assert [(job.progress.amount, job.progress.counted) for job in parts] == [(2, None), (2, None), (0, None)]


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


def test_a_part_needs_the_statistics_of_its_blocks_alone_and_what_is_outside_them_all(undisturbed):
    found = jobs(checked(undisturbed), [Chunk(1, 3), Chunk(2, 3), Chunk(3, 3)])
    calibrate = found.preparing[0].name
    # Of four blocks.
    of_parts = [[0], [1], [2, 3]] * 2
    parts = [job for job in found.quantizing if job.enough]
    for job, blocks in zip(parts, of_parts, strict=True):
        assert job.enough == {calibrate: files_of(blocks)}
    whole = [job for job in found.quantizing if not job.enough]
    assert all(calibrate in job.needs for job in whole)
    assert stages(job.name for job in whole) == ["quantize"] * 2


@pytest.mark.parametrize(
    ("override", "first"),
    [("--calibration.keep=false", "quantize"), ("--quantize.low_rank={budget_bits=4.6,format='x8'}", "calibrate")],
)
def test_a_part_waits_for_all_where_ranks_depend_on_it_and_for_nothing_where_statistics_are_not_kept(
    undisturbed, override, first
):
    found = jobs(checked(undisturbed, override, "--evaluation.baselines=[]"), [Chunk(1, 2), Chunk(2, 2)])
    schedule = Schedule([*found.preparing, *found.quantizing])
    assert set(stages(schedule.ready())) == {first}
    for need in schedule.awaited():
        schedule.see(need, files_of(range(4)))
    assert set(stages(schedule.ready())) == {first}


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


def test_parts_are_made_while_the_statistics_of_later_blocks_are_not_there(experiment, monkeypatch):
    """And all others after that: the bytes of one process."""
    alone = checked(experiment, f"--output_dir={experiment.folder / 'alone'}", "--evaluation.baselines=[]")
    run_here([*jobs(alone).preparing, *jobs(alone).quantizing], alone.store)
    run = checked(experiment, "--evaluation.baselines=[]")
    found = jobs(run, [Chunk(index + 1, 4) for index in range(4)])
    with monkeypatch.context() as killed:
        killed.setattr(store, "Workspace", dying_workspace(block_file(2)))
        with pytest.raises(KilledError):
            run_here(found.preparing, run.store)
    schedule = Schedule(found)
    (calibrate,) = schedule.awaited()
    schedule.see(calibrate, run.store.files(calibrate))
    first, *parts = schedule.ready()
    assert first == calibrate
    assert [name.rpartition(" ")[2] for name in parts] == ["1/4", "2/4"]
    run_here([schedule.jobs[name] for name in parts], run.store)
    assert run.experiment.calibrate.find(run.store) is None
    (partial,) = run.store.root.glob("quantize-*.partial")
    assert sorted(path.name for path in partial.glob("block-*")) == [block_file(0), block_file(1)]
    run_here([*found.preparing, *found.quantizing], run.store)
    assert stored(experiment.output) == stored(experiment.folder / "alone")


def test_the_store_says_which_jobs_are_left(experiment):
    run = checked(experiment, "--evaluation.baselines=[]")
    found = jobs(run)
    run_here(found.preparing, run.store)
    schedule = Schedule(found, [job.name for job in found if job.is_done(run.store)])
    assert stages(schedule.ready()) == ["quantize"]
    run_here(found, run.store)
    assert all(job.is_done(run.store) for job in found)


@pytest.fixture
def measured(experiment) -> list[str]:
    """Overrides: two models on a text and a task."""
    _, task = experiment.task()
    return ['--evaluation.baselines=["original"]', *task, "--evaluation.downstream.batch_size=2"]


def stored_results(folder: Path) -> dict[str, bytes]:
    found = [path for kind in ("perplexity", "downstream") for path in folder.glob(f"store/{kind}-*/*")]
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in found if path.name != MANIFEST}


def in_parts(run: CheckedRun, parts: int) -> list[Job]:
    return list(jobs_of(run.experiment, run.context.summary.blocks, (), parts))


@pytest.mark.parametrize("blockwise", ["false", "true"])
def test_an_evaluation_in_parts_ends_with_the_bytes_of_one_process(experiment, measured, monkeypatch, blockwise):
    measured = [*measured, f"--evaluation.blockwise={blockwise}"]
    monkeypatch.setattr(requests, "BATCHES_OF_A_UNIT", 1)
    alone = checked(experiment, f"--output_dir={experiment.folder / 'alone'}", *measured)
    run_here(in_parts(alone, 1), alone.store)
    shared = checked(experiment, f"--output_dir={experiment.folder / 'shared'}", *measured)
    made = in_parts(shared, 3)
    shares = [job for job in made if job.name.endswith("/3")]
    evaluations = [job for job in made if job.name.startswith("evaluate")]
    # The perplexity and the tasks of two models.
    assert len(shares) == 3 * 4
    assert {job.name for job in shares} == {need for job in evaluations for need in job.needs if "/" in need}
    before = [job for job in made if job not in shares and job not in evaluations]
    # The last ones first, and one is left to who ends the evaluation.
    run_here([*before, *shares[:0:-1], *evaluations], shared.store)
    assert len(stored_results(experiment.folder / "alone")) == 4
    assert stored_results(experiment.folder / "shared") == stored_results(experiment.folder / "alone")


def test_parts_of_an_evaluation_that_were_made_are_not_made_again(experiment, measured, monkeypatch):
    run = checked(experiment, *measured)
    made = in_parts(run, 3)
    first = [job for job in made if job.name.endswith(" 1/3") and job.name.startswith("perplexity")]
    run_here([*(job for job in made if "/" not in job.name and "evaluate" not in job.name), *first], run.store)
    counted: list[int] = []
    losses = evaluate.window_nlls

    def counting(model, windows):
        counted.append(len(windows))
        return losses(model, windows)

    monkeypatch.setattr(evaluate, "window_nlls", counting)
    run_here([job for job in in_parts(run, 1) if job.name.startswith("evaluate")], run.store)
    (stage, _) = (job.produces[0] for job in first)
    assert counted == [stage.most_parts - len(range(stage.most_parts // 3))] * 2


def test_jobs_of_one_model_say_so_and_longer_ones_come_first(undisturbed):
    run = checked(undisturbed, '--evaluation.baselines=["original"]')
    made = list(jobs_of(run.experiment, run.context.summary.blocks, (), parts=2, minutes=100.0))
    models = {job.model for job in made if job.model is not None}
    assert models == set(run.experiment.candidates)
    schedule = Schedule(made)
    ready = schedule.ready()
    # Calibration, which quantization waits for; then the parts of the original's evaluation.
    assert stages(ready) == ["calibrate", "perplexity", "perplexity"]


@pytest.mark.parametrize("override", ["--seed=0", "--cluster.address=off"])
def test_a_run_alone_imports_and_starts_nothing_of_a_cluster_or_a_gang(experiment, override):
    program = """
import sys
import time
import psutil
from lqer.cli import main
status = main(sys.argv[1:], "")
found = {"ray", "lqer.jobs.on_ray", "lqer.run.cluster", "lqer.run.worker", "lqer.store.remote", "lqer.stages.ranks"}
started = [process.name() for process in psutil.Process().children(recursive=True)]
sys.exit(status or " ".join([*found & set(sys.modules), *started]) or 0)
"""
    command = [sys.executable, "-c", program, str(experiment.config), "run", "--evaluation.baselines=[]", override]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_list_of_jobs_of_a_run_costs_next_to_nothing(undisturbed):
    """Every run makes it, with a cluster or without."""
    run = checked(undisturbed)
    started = time.process_time()
    for _ in range(10):
        jobs(run)
    assert time.process_time() - started < 10 * 0.05
