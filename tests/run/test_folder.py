"""The folder of a run: what may be written where, and when."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest

from lqer.config import read_config
from lqer.errors import LqerError, RunFolderError, StoreError
from lqer.results import RESULTS_FILE
from lqer.run import pipeline
from lqer.run.folder import LOG_FILE, begin_run, locked, run_folder
from lqer.store import locks
from lqer.store.names import CHECKPOINT_LINK


def config_of(experiment, *overrides: str, tag: str = "tiny"):
    return read_config(experiment.config, tag, overrides)


def test_a_refused_run_leaves_the_results_of_the_last_one(experiment):
    pipeline.run(config_of(experiment))
    folder = experiment.output / "tiny"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for override in ("--model=/nowhere/at/all", '--evaluation.perplexity.datasets=["/nowhere.txt"]'):
        with pytest.raises(LqerError):
            pipeline.run(config_of(experiment, override))
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_folder_whose_locks_exclude_nobody_is_refused_before_the_last_results_go(experiment, monkeypatch):
    folder = experiment.output / "tiny"
    with locked(folder, config_of(experiment)):
        (folder / RESULTS_FILE).write_text("{}")
    monkeypatch.setattr(locks.FileLock, "acquire", lambda *arguments, **options: nullcontext())
    with pytest.raises(StoreError, match=r"checkpoints is on a file system whose locks exclude nobody: set output_dir"):
        pipeline.run(config_of(experiment))
    assert (folder / RESULTS_FILE).exists()


def test_a_folder_of_somebody_else_is_not_written_into(experiment):
    folder = experiment.output / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("mine")
    with pytest.raises(RunFolderError, match=r"tiny was not made by a run and is not empty"):
        pipeline.run(config_of(experiment))
    assert [path.name for path in folder.iterdir()] == ["config.toml"]


def test_a_file_with_the_name_of_the_folder_is_refused(experiment):
    experiment.output.mkdir()
    (experiment.output / "tiny").write_text("mine")
    with pytest.raises(RunFolderError, match="is not a folder"):
        run_folder(config_of(experiment))


def test_a_real_folder_in_place_of_the_link_is_refused_before_any_work(experiment):
    pipeline.run(config_of(experiment))
    link = experiment.output / "tiny" / CHECKPOINT_LINK
    link.unlink()
    link.mkdir()
    with pytest.raises(RunFolderError, match="is not a link to an artifact"):
        pipeline.run(config_of(experiment))


def test_other_settings_under_a_tag_in_use_are_refused(experiment):
    first, second = config_of(experiment), config_of(experiment, "--quantize.low_rank.rank=4")
    folder = run_folder(first)
    refused = pytest.raises(RunFolderError, match=r"tag 'tiny': another process runs it with other settings")
    with locked(folder, first), refused, locked(folder, second):
        pytest.fail("both hold the folder")
    with locked(folder, second):
        pass


def test_chunks_of_one_run_hold_the_folder_together(experiment):
    config, other = config_of(experiment), config_of(experiment, "--seed=1")
    folder = run_folder(config)
    refused = pytest.raises(RunFolderError, match="with other settings")
    with locked(folder, config, "-1-of-2"), locked(folder, config, "-2-of-2"), refused, locked(folder, other):
        pytest.fail("both hold the folder")


def test_lines_logged_before_the_folder_is_opened_are_in_its_log(experiment):
    pipeline.run(config_of(experiment))
    assert "28 linears in 4 blocks" in (experiment.output / "tiny" / LOG_FILE).read_text()


def test_results_of_an_earlier_run_are_gone_once_a_new_one_begins(experiment):
    config = config_of(experiment)
    folder = run_folder(config)
    with locked(folder, config):
        (folder / "results.json").write_text(json.dumps({}))
        begin_run(folder, config)
    assert not (folder / "results.json").exists()
