"""The command line: what it prints, and one line with status 2 for every mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lqer.cli import split_arguments
from lqer.errors import ConfigError

ROOT = Path(__file__).parents[2]


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "experiments/pipeline.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["c.toml"], (False, "c.toml", None, [])),
        (["c.toml", "tag", "--a.b=1"], (False, "c.toml", "tag", ["--a.b=1"])),
        (["--a=1", "c.toml", "--b=2", "tag"], (False, "c.toml", "tag", ["--a=1", "--b=2"])),
        (["--validate", "c.toml"], (True, "c.toml", None, [])),
    ],
)
def test_arguments_may_come_in_any_order(arguments, expected):
    assert split_arguments(arguments) == expected


@pytest.mark.parametrize("arguments", [["--a=1"], ["a", "b", "c"], ["c.toml", "-x"], []])
def test_other_arguments_are_refused(arguments):
    with pytest.raises(ConfigError):
        split_arguments(arguments)


def test_a_run_ends_with_the_table_and_the_path_of_the_report(experiment):
    done = subprocess.run(experiment.command("my-tag"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| bits per quantized weight | – | 4.500 |" in done.stdout
    assert "| | original | RTN | lqer-act |" in done.stdout
    report = Path(done.stdout.split("report: ")[1].strip())
    assert report == experiment.output / "my-tag" / "report.md"
    assert report.exists()


def test_without_arguments_the_usage_is_printed():
    done = call()
    assert done.returncode == 2
    assert "experiments/pipeline.py CONFIG [TAG]" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nowhere.toml"], "no such config file: nowhere.toml"),
        (["configs/demo.toml", "--quantize.wieght=w4"], "did you mean 'weight'?"),
        (["configs/demo.toml", "a", "b"], "at most one tag"),
        (["configs/demo.toml", "--model=/nowhere"], "no such file or folder: /nowhere"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_status_2(arguments, part):
    done = call(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_validate_checks_a_local_model_and_runs_nothing(experiment):
    done = subprocess.run(experiment.command("--validate"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "28 of 28 linears in 4 blocks are quantized" in done.stdout
    assert done.stdout.rstrip().endswith("valid")
    assert not experiment.output.exists()


def test_validate_refuses_a_share_as_the_run_would(experiment):
    command = experiment.command("--validate", "--chunk", "1/2", "--quantize.propagate_error=true")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --chunk 1/2: requires quantize.propagate_error")
    assert done.stderr.count("\n") == 1


def test_validate_of_a_hub_model_does_not_need_the_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = call("--validate", "configs/template/llama-7b.toml")
    assert done.returncode == 0, done.stderr
    assert "w4 (mxint, 4.5 bits)" in done.stdout
    assert "not checked against the model" in done.stdout
