"""The estimate stands before the work: in the log of a run, under --validate, and as a refusal with status 2."""

from __future__ import annotations

import pytest

from lqer.cli import main
from lqer.config import read_config
from lqer.resources.workload import total
from lqer.run.context import prepare
from lqer.run.preflight import estimate_stages


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch):
    """`has(ram=…, disk=…)`: pretend that this machine has so many bytes."""

    def pretend(ram: int | None = None, disk: int | None = None) -> None:
        if ram is not None:
            monkeypatch.setattr("lqer.resources.machine.usable_ram", lambda: ram)
        if disk is not None:
            monkeypatch.setattr("lqer.resources.machine.free_disk", lambda folder: disk)

    return pretend


def test_validate_shows_the_estimate(experiment, capsys):
    assert main(["--validate", str(experiment.config)], "") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["stage", "RAM", "GPU", "memory", "disk"] in lines
    first_words = [line[0] for line in lines[-6:]]
    assert first_words == ["calibrate", "quantize", "evaluate", "available", "28", "valid"]


def test_validate_ends_with_status_2_after_the_estimate_where_the_run_cannot_fit(experiment, capsys, has):
    has(ram=1000)
    assert main(["--validate", str(experiment.config)], "") == 2
    out, err = capsys.readouterr()
    assert "calibrate" in out
    assert "valid" not in out.split()
    assert err.splitlines()[-1].startswith("error: calibrate needs at least ")


@pytest.mark.parametrize(
    ("few", "part"),
    [
        ({"ram": 1000}, "error: calibrate needs at least "),
        ({"disk": 1000}, "under output_dir but only 1.0 kB is free. Put output_dir on a larger disk."),
    ],
)
def test_a_run_that_cannot_fit_is_refused_before_any_work(experiment, capsys, has, few, part):
    has(**few)
    assert main([str(experiment.config)], "") == 2
    assert part in capsys.readouterr().err.splitlines()[-1]
    assert not list((experiment.output / "store").glob("*"))


def test_a_run_that_cannot_fit_is_refused_before_its_model_is_rotated(experiment, capsys, has):
    has(ram=1000)
    assert main([str(experiment.config), "--quantize.transforms=['quarot']"], "") == 2
    assert "error: rotate needs at least " in capsys.readouterr().err.splitlines()[-1]
    assert not list((experiment.output / "store").glob("*"))


def test_what_a_rotated_run_has_made_needs_no_disk(experiment, has):
    rotated = [str(experiment.config), "--quantize.transforms=['quarot']"]
    assert main(rotated, "") == 0
    has(disk=0)
    assert main(rotated, "") == 0


def test_what_is_made_already_needs_no_disk(experiment, has):
    assert main([str(experiment.config)], "") == 0
    log = (experiment.output / "tiny" / "run.log").read_text()
    assert "Estimated memory and disk (with an empty store):" in log
    has(disk=0)
    assert main([str(experiment.config)], "") == 0


def test_a_model_too_large_to_be_evaluated_whole_is_told_to_go_block_by_block(experiment, capsys, has, monkeypatch):
    """The limit lies between what the run needs at least in the one way and in the other."""
    monkeypatch.setattr("lqer.resources.machine.resident_bytes", lambda: 0)
    # Few windows: the hidden states of many are more than this tiny model.
    whole = ["--evaluation.perplexity.max_windows=1", "--evaluation.perplexity.batch_size=1"]
    blockwise = [*whole, "--evaluation.blockwise=true"]

    def needed(overrides: list[str]) -> int:
        stages = estimate_stages(prepare(read_config(experiment.config, None, overrides)))
        return max(total(stage.ram, certain=True) for stage in stages)

    assert needed(blockwise) < needed(whole)
    has(ram=(needed(blockwise) + needed(whole)) // 2)
    assert main(["--validate", str(experiment.config), *whole], "") == 2
    assert "(whole model: " in (refusal := capsys.readouterr().err.splitlines()[-1])
    assert refusal.endswith("Set evaluation.blockwise = true.")
    assert main(["--validate", str(experiment.config), *blockwise], "") == 0
