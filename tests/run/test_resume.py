"""A run that is killed anywhere goes on where it stopped and ends with the same bytes and the same numbers."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from lqer.config import read_config
from lqer.run import pipeline
from lqer.store.store import Workspace


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def checkpoint_bytes(output: Path) -> dict[str, bytes]:
    folder = output / "tiny" / "checkpoint"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def numbers(results) -> dict:
    return {key: results[key] for key in ("bits", "baseline", "perplexity", "calibration", "layers")}


@pytest.mark.parametrize(
    ("propagate", "writes"),
    [*(("original", writes) for writes in (0, 1, 2, 5, 9, 12, 17, 24, 36, 41)), ("quantized", 4), ("quantized", 8)],
)
def test_a_run_killed_at_any_write_ends_like_one_that_was_not(experiment, undisturbed, monkeypatch, propagate, writes):
    stream = [f"--quantize.propagate={propagate}"]
    whole = pipeline.run(read_config(undisturbed.config, None, stream))
    original_write, count = Workspace.write, 0

    def write_until_killed(self, name, write):
        nonlocal count
        if count == writes:
            raise Killed
        count += 1
        original_write(self, name, write)

    monkeypatch.setattr(Workspace, "write", write_until_killed)
    with pytest.raises(Killed):
        pipeline.run(read_config(experiment.config, None, stream))
    assert not (experiment.output / "tiny" / "results.json").exists()
    monkeypatch.undo()

    resumed = pipeline.run(read_config(experiment.config, None, stream))
    assert checkpoint_bytes(experiment.output) == checkpoint_bytes(undisturbed.output)
    assert numbers(resumed) == numbers(whole)


def wait_for(pattern: str, folder: Path, process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not list(folder.glob(pattern)):
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline, f"no {pattern} within {seconds} s"
        time.sleep(0.005)


def test_a_killed_process_is_gone_on_with_by_the_same_command(experiment):
    command = experiment.command("--calibration.num_samples=200", "--evaluation.baselines=[]")
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for("store/calibrate-*.partial/block-00001.safetensors", experiment.output, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # The block before is sure to be in the journal; the last one may have been killed on its way there.
    kept = next(experiment.output.glob("store/calibrate-*.partial/block-00000.safetensors")).stat().st_mtime_ns

    resumed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    block = next(experiment.output.glob("store/calibrate-*/block-00000.safetensors"))
    assert block.stat().st_mtime_ns == kept

    whole = experiment.command("--calibration.num_samples=200", "--evaluation.baselines=[]",
                               f"--output_dir={experiment.folder / 'whole'}")  # fmt: skip
    assert subprocess.run(whole, capture_output=True, check=False).returncode == 0
    assert checkpoint_bytes(experiment.output) == checkpoint_bytes(experiment.folder / "whole")


def test_an_interrupt_is_answered_with_one_line_and_status_130(experiment):
    command = experiment.command("--calibration.num_samples=200")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_for("store/calibrate-*.partial/block-00000.safetensors", experiment.output, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.rstrip().endswith("interrupted; the same command goes on where it stopped")
    assert "Traceback" not in stderr


def test_two_processes_on_one_store_both_end_well_with_the_same_numbers(experiment):
    first = subprocess.Popen(experiment.command("first"), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    second = subprocess.Popen(experiment.command("second"), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    outputs = [process.communicate(timeout=180) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    tables = [output.split("report:")[0] for output, _ in outputs]
    assert tables[0] == tables[1]
    assert len(list(experiment.output.glob("store/calibrate-*"))) == 1
