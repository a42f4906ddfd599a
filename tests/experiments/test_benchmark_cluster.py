"""The benchmark of gangs and workers: what its rows say of a tiny model on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster_benchmark import workers as workers_module
from cluster_benchmark.setup import Setup
from cluster_benchmark.workers import DoneJob, _on_cluster, _shown, _wall, begun_early, jobs_in, said
from pipeline_benchmark.checkpoint import SHAPES

from lqer.config import read_config
from lqer.jobs import on_ray
from lqer.jobs.graph import Job, Schedule
from lqer.jobs.on_ray import DONE, LOST, after_loss

SCRIPT = Path(__file__).parents[2] / "experiments/benchmark_cluster.py"
SMALL = [
    "--shape", "tiny", "--windows", "4", "--calibration.num_samples=4", "--calibration.seq_len=64",
    "--calibration.error_tokens=64", "--evaluation.perplexity.seq_len=64",
]  # fmt: skip


def test_a_gang_is_timed_killed_and_compared_with_one_process(tmp_path):
    command = [sys.executable, str(SCRIPT), "gangs", *SMALL, "--folder", str(tmp_path), "--presets", "gptq", "--kill"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    one, two = ([cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| gptq"))
    assert (one[2], two[2]) == ("1", "2")
    # Files and perplexity.
    assert one[-3:] == two[-3:]
    equal, of, files = two[-3].split()
    assert of == "of"
    assert int(equal) == int(files) > 5
    assert any("process 2 of 2 was killed by SIGKILL" in line for line in lines)
    assert any(line.startswith("the same command, with 1 of 2 blocks") and two[-3] in line for line in lines)


def test_jobs_that_ended_and_workers_that_were_lost_are_what_the_driver_says(capsys):
    schedule = Schedule([Job("quantize-1 1/2", (), (), lambda store: None)])
    schedule.start("quantize-1 1/2")
    with said(DONE) as done, said(LOST) as lost:
        after_loss(schedule, "quantize-1 1/2", times=1, retries=3, reason="killed")
        on_ray.log.info(DONE, "vm/7", "quantize-1 1/2", 2.5)
    (job,) = jobs_in(done)
    assert (job.worker, job.name, job.seconds, job.kind) == ("vm/7", "quantize-1 1/2", 2.5, "quantize")
    assert len(lost) == 1
    # Also of a call that is cut off.
    shown = capsys.readouterr().err.splitlines()
    assert [line.partition(" s: ")[2] for line in shown] == [record.getMessage() for record in (*lost, *done)]
    assert shown[1].endswith(" s: vm/7, quantize-1 1/2: done in 2.5 s")


def test_seconds_of_each_worker_are_shown_the_busiest_first():
    jobs = [
        DoneJob("a", "quantize-1 1/2", 3.0, 103.0),
        DoneJob("b", "quantize-1 2/2", 4.0, 104.0),
        DoneJob("a", "quantize-1", 0.5, 104.5),
        DoneJob("b", "run tag", 1.0, 105.0),
    ]
    assert _shown(jobs, "quantize") == "4.0 + 3.5 (3)"
    assert _shown(jobs, "perplexity") == ""
    assert _wall(jobs) == 5.0


def test_parts_that_began_before_the_last_statistics_are_counted():
    parts = [DoneJob("b", f"quantize-1 {part}/3", 2.0, end) for part, end in ((1, 103.0), (2, 106.0), (3, 107.5))]
    assert begun_early([DoneJob("a", "calibrate-1", 5.0, 105.0), *parts]) == 2
    assert begun_early(parts) == 0


@pytest.mark.parametrize(
    ("gpus", "workers", "settings", "seen"),
    [
        (4, 2, "--cluster.gpus_per_job=1.0", "0,1"),
        (1, 3, "--cluster.gpus_per_job=0.3333", "0"),
        (2, 3, "--cluster.gpus_per_job=0.5", "0,1"),
        # Seven of 0.1429 would be more than a card.
        (1, 7, "--cluster.gpus_per_job=0.1428", "0"),
        (0, 2, "--cluster.cpus_per_job=1", None),
    ],
)
def test_workers_share_out_what_the_machine_has(monkeypatch, gpus, workers, settings, seen):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr(workers_module, "_gpus", lambda: [str(index) for index in range(gpus)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", "")
    assert _on_cluster(workers) == ["--cluster.address=local", settings]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == (seen or "")
    assert os.environ["RAY_OVERRIDE_RESOURCES"] == ("" if gpus else f'{{"CPU": {workers}}}')


def test_a_model_that_is_given_is_taken_with_the_texts_of_the_settings(tmp_path):
    text = "--calibration.dataset=its.txt"
    setup = Setup(tmp_path, SHAPES["tiny"], 4, [text], given=tmp_path / "given")
    setup.write()
    assert list(tmp_path.iterdir()) == []
    config = read_config(setup.config("lqer-act"), "tag", [text])
    assert config.model == str(tmp_path / "given")
    assert config.calibration.dataset.path == "its.txt"
