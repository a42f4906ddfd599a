"""Quantization in chunks on one store: the last process to finish evaluates, and the result is that of one process."""

from __future__ import annotations

import pytest

from lqer.config import read_config
from lqer.errors import ConfigError
from lqer.run import pipeline
from lqer.run.chunks import Chunk


def test_chunks_in_any_order_give_the_result_of_one_process(experiment, tmp_path):
    config = read_config(experiment.config, "shared")
    assert pipeline.run_chunk(config, Chunk(2, 3)) is None
    assert pipeline.run_chunk(config, Chunk(3, 3)) is None
    shared = pipeline.run_chunk(config, Chunk(1, 3))
    alone = pipeline.run(read_config(experiment.config, "alone", [f"--output_dir={tmp_path / 'elsewhere'}"]))
    assert shared["perplexity"] == alone["perplexity"]
    assert shared["bits"] == alone["bits"]


def test_a_finished_chunk_is_not_built_again(experiment, caplog):
    config = read_config(experiment.config, "again")
    pipeline.run_chunk(config, Chunk(1, 2))
    assert pipeline.run_chunk(config, Chunk(1, 2)) is None
    assert "chunk 1/2 finished; waiting for the remaining chunks" in caplog.text


def test_error_propagation_refuses_chunks_with_the_reason(experiment):
    config = read_config(experiment.config, "stream", ["--quantize.propagate_error=true"])
    with pytest.raises(
        ConfigError,
        match=r"--chunk 1/2: requires quantize\.propagate_error = .* each block depends on the quantized blocks before",
    ):
        pipeline.run_chunk(config, Chunk(1, 2))


def test_a_method_that_implies_error_propagation_refuses_chunks_unless_told_otherwise(experiment, monkeypatch):
    method = read_config(experiment.config, "stream").quantize.method
    monkeypatch.setattr(type(method), "propagate_error", True)
    with pytest.raises(ConfigError, match=rf"implied by method '{method.kind}'"):
        pipeline.run_chunk(read_config(experiment.config, "stream"), Chunk(1, 2))
    original = read_config(experiment.config, "stream", ["--quantize.propagate_error=false"])
    assert pipeline.run_chunk(original, Chunk(1, 2)) is None
