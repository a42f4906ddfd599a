"""A run under a budget of memory, evaluated block by block: nothing loads the model whole, the numbers are the same."""

from __future__ import annotations

import pytest

from lqer.config import read_config
from lqer.models.loaders import Streamed
from lqer.run import pipeline

BUDGET = ["--quantize.method=qera-exact", "--quantize.low_rank.rank=0", "--quantize.low_rank.budget_bits=6.5"]


def refuse_whole_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments, **options):
        pytest.fail("a model was loaded whole")

    for place in (
        "lqer.run.evaluations.load_whole",
        "lqer.models.streaming.load_model",
        "lqer.run.evaluations.load_verified",
    ):
        monkeypatch.setattr(place, refuse)
    monkeypatch.setattr(Streamed, "materialize", refuse)


def test_ranks_under_a_budget_of_bits_are_those_of_the_whole_model(experiment, tmp_path, monkeypatch):
    whole = pipeline.run(read_config(experiment.config, "whole", BUDGET))
    refuse_whole_models(monkeypatch)
    overrides = [*BUDGET, "--evaluation.blockwise=true", "--calibration.max_memory=20kB"]
    overrides.append(f"--output_dir={tmp_path / 'elsewhere'}")
    blockwise = pipeline.run(read_config(experiment.config, "blockwise", overrides))
    assert blockwise["allocation"] == whole["allocation"]
    assert blockwise["bits"] == whole["bits"]
    assert blockwise["perplexity"] == whole["perplexity"]
    assert 6.0 < blockwise["bits"]["average"] <= 6.5


def test_the_quantized_stream_goes_block_by_block_too(experiment, monkeypatch):
    def refuse(*arguments, **options):
        pytest.fail("a model was loaded whole")

    monkeypatch.setattr(Streamed, "materialize", refuse)
    monkeypatch.setattr("lqer.models.streaming.load_model", refuse)
    overrides = ["--quantize.propagate_error=true", "--evaluation.blockwise=true", "--evaluation.baselines=[]"]
    results = pipeline.run(read_config(experiment.config, "stream", overrides))
    assert results["perplexity"][0]["quantized"] > 1


def test_tasks_are_scored_block_by_block_as_by_the_whole_model(experiment, monkeypatch):
    _, task = experiment.task()
    whole = pipeline.run(read_config(experiment.config, "whole", task))
    refuse_whole_models(monkeypatch)
    elsewhere = f"--output_dir={experiment.folder / 'elsewhere'}"
    blockwise = pipeline.run(
        read_config(experiment.config, "blockwise", [*task, "--evaluation.blockwise=true", elsewhere])
    )
    assert len(blockwise["downstream"]) == 2
    assert blockwise["downstream"] == whole["downstream"]
