"""The atlas of a recommendation: one that is there is read, else its cheap part is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_runs import run_results

from lqer.config import Config
from lqer.config.sweep import plan_sweep
from lqer.errors import DataError
from lqer.models.source import resolve_model
from lqer.results import RESULTS_FILE
from lqer.run.recommend import CHEAP, atlas_of
from lqer.run.sweep import Execute, run_sweep


class Runner:
    """Stands in for the processes of runs: notes their tags, and leaves results without running anything."""

    def __init__(self, model: Path, fails: str = "") -> None:
        self.fingerprint = resolve_model(str(model)).fingerprint
        self.fails = fails
        self.tags: list[str] = []

    def __call__(self, config: Config) -> str | None:
        self.tags.append(config.tag)
        if config.tag == self.fails:
            return "it broke"
        results = run_results(config.tag, 3.0, {"text": 9.0})
        results["config"] = config.model_dump(mode="json", exclude_none=True)
        results["model"]["fingerprint"] = self.fingerprint
        results["checkpoint_bytes"] = 10**9
        folder = Path(config.output_dir) / config.tag
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULTS_FILE).write_text(json.dumps(results))
        return None


@pytest.fixture
def cheap(experiment) -> list[str]:
    return [run.config.tag for run in plan_sweep("atlas", experiment.config, "atlas").part(CHEAP["cpu"]).runs]


def by(execute: Execute):
    """How the runs of a sweep are done."""
    return lambda plan, tag: run_sweep(plan, execute)


def quiet(line: str) -> None:
    """Says nothing."""


def test_without_an_atlas_its_cheap_part_is_run_once(experiment, tiny_model, cheap):
    runner = Runner(tiny_model)
    record, ranking = atlas_of(str(experiment.config), [], None, by(runner), quiet)
    assert sorted(runner.tags) == sorted(cheap)
    assert set(ranking.table["run"]) == {tag.removeprefix("atlas-") for tag in cheap}
    # The record is that of the whole atlas, so that a recommendation can name what is missing.
    assert len(record.runs) > len(cheap)
    assert record.command.startswith("lqer sweep atlas ")
    atlas_of(str(experiment.config), [], None, by(runner), quiet)
    assert len(runner.tags) == len(cheap)


def test_of_an_interrupted_atlas_what_is_finished_is_read(experiment, tiny_model, cheap):
    runner = Runner(tiny_model)

    def interrupted(config: Config) -> str | None:
        if len(runner.tags) == 2:
            raise KeyboardInterrupt
        return runner(config)

    with pytest.raises(KeyboardInterrupt):
        atlas_of(str(experiment.config), [], None, by(interrupted), quiet)
    _, ranking = atlas_of(str(experiment.config), [], None, None, quiet)
    assert set(ranking.table["run"]) == {tag.removeprefix("atlas-") for tag in cheap[:2]}


def test_where_every_run_fails_the_first_line_is_told(experiment, cheap):
    told = rf"no run of the atlas succeeded; {cheap[0].removeprefix('atlas-')}: it broke"
    with pytest.raises(DataError, match=told):
        atlas_of(str(experiment.config), [], None, by(lambda config: "it broke"), quiet)


def test_a_run_that_failed_is_tried_again_and_the_others_count(experiment, tiny_model, cheap):
    runner = Runner(tiny_model, fails=cheap[0])
    _, ranking = atlas_of(str(experiment.config), [], None, by(runner), quiet)
    assert len(ranking.table) == len(cheap) - 1
    runner.fails = ""
    assert len(atlas_of(str(experiment.config), [], None, by(runner), quiet)[1].table) == len(cheap)


def test_an_atlas_of_another_tag_is_taken_as_it_is(experiment, tiny_model, cheap):
    runner = Runner(tiny_model, fails=cheap[0].replace("atlas-", "mine-"))
    atlas_of(str(experiment.config), [], "mine", by(runner), quiet)
    tried = len(runner.tags)
    assert atlas_of(str(experiment.config), [], None, by(runner), quiet)[0].tag == "mine"
    assert len(runner.tags) == tried


def test_nothing_runs_unless_asked_for(experiment):
    with pytest.raises(DataError, match="no atlas of"):
        atlas_of(str(experiment.config), [], None, None, quiet)


def test_a_model_alone_is_enough_of_a_configuration(tiny_model, tmp_path):
    overrides = [f"--model={tiny_model}", f"--output_dir={tmp_path}"]
    runner = Runner(tiny_model)
    assert len(atlas_of("preset:protocols/two-texts", overrides, None, by(runner), quiet)[1].table) == len(runner.tags)
