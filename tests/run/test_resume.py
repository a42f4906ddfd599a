"""A run that is killed anywhere resumes and ends with the same bytes and the same numbers."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from helpers import byte_tokenizer
from killing import KilledError, dying_workspace, signalled_command
from mixtures import random_mixture

from lqer.config import read_config
from lqer.run import pipeline
from lqer.store import store


def checkpoint_bytes(output: Path) -> dict[str, bytes]:
    folder = output / "tiny" / "checkpoint"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def numbers(results) -> dict:
    return {key: results[key] for key in ("bits", "baseline", "perplexity", "calibration", "layers")}


@pytest.mark.parametrize(
    ("propagates", "writes"),
    [*(("false", writes) for writes in (0, 1, 2, 5, 9, 12, 17, 24, 36, 41)), ("true", 4), ("true", 8)],
)
def test_a_run_killed_at_any_write_ends_like_one_that_was_not(experiment, undisturbed, monkeypatch, propagates, writes):
    stream = [f"--quantize.propagate_error={propagates}"]
    whole = pipeline.run(read_config(undisturbed.config, None, stream))
    monkeypatch.setattr(store, "Workspace", dying_workspace(at_write=writes))
    with pytest.raises(KilledError):
        pipeline.run(read_config(experiment.config, None, stream))
    assert not (experiment.output / "tiny" / "results.json").exists()
    monkeypatch.undo()

    resumed = pipeline.run(read_config(experiment.config, None, stream))
    assert checkpoint_bytes(experiment.output) == checkpoint_bytes(undisturbed.output)
    assert numbers(resumed) == numbers(whole)


@pytest.mark.parametrize(("method", "writes"), [("lqer-act", 1), ("lqer-act", 6), ("gptq", 3)])
def test_a_killed_run_of_a_mixture_ends_like_one_that_was_not(experiment, monkeypatch, tmp_path, method, writes):
    model = tmp_path / "mixture"
    random_mixture("qwen3_moe", vocab_size=256).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    more = ["--quantize.low_rank.rank=0"] if method == "gptq" else ["--quantize.low_rank.rank=4"]
    settings = [f"--model={model}", f"--quantize.method={method}", "--evaluation.baselines=[]", *more]
    whole = pipeline.run(read_config(experiment.config, None, [*settings, f"--output_dir={tmp_path / 'whole'}"]))
    monkeypatch.setattr(store, "Workspace", dying_workspace(at_write=writes))
    with pytest.raises(KilledError):
        pipeline.run(read_config(experiment.config, None, settings))
    monkeypatch.undo()
    resumed = pipeline.run(read_config(experiment.config, None, settings))
    assert checkpoint_bytes(experiment.output) == checkpoint_bytes(tmp_path / "whole")
    assert numbers(resumed) == numbers(whole)
    assert resumed["experts"] == whole["experts"] is not None


def test_the_same_command_resumes_a_killed_process(experiment):
    command = experiment.command("--evaluation.baselines=[]")
    # Calibration writes a table of sites and a block, in turn: the second block's file is cut off.
    killed = subprocess.run(signalled_command(command, signal.SIGKILL, at_write=3), capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    (partial,) = experiment.output.glob("store/calibrate-*.partial")
    written = (partial / "block-00000.safetensors").stat().st_mtime_ns
    assert not (partial / "block-00001.safetensors").exists()

    resumed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    (block,) = experiment.output.glob("store/calibrate-*/block-00000.safetensors")
    assert block.stat().st_mtime_ns == written

    whole = experiment.command("--evaluation.baselines=[]", f"--output_dir={experiment.folder / 'whole'}")
    assert subprocess.run(whole, capture_output=True, check=False).returncode == 0
    assert checkpoint_bytes(experiment.output) == checkpoint_bytes(experiment.folder / "whole")


def test_an_interrupt_is_answered_with_one_line_and_status_130(experiment):
    command = signalled_command(experiment.command(), signal.SIGINT, at_write=1)
    interrupted = subprocess.run(command, capture_output=True, text=True, check=False)
    assert interrupted.returncode == 130
    assert interrupted.stderr.rstrip().endswith("Interrupted. Rerun the same command to resume.")
    assert "Traceback" not in interrupted.stderr


def test_two_processes_on_one_store_both_end_well_with_the_same_numbers(experiment):
    first = subprocess.Popen(experiment.command("first"), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    second = subprocess.Popen(experiment.command("second"), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    outputs = [process.communicate() for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    tables = [output.split("report:")[0] for output, _ in outputs]
    assert tables[0] == tables[1]
    assert len(list(experiment.output.glob("store/calibrate-*"))) == 1
