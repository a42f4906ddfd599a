"""A quantization in shares on one store: the last to finish evaluates, and the result is that of one process."""

from __future__ import annotations

import dataclasses

import pytest

from lqer.config import read_config
from lqer.errors import ConfigError
from lqer.methods import METHODS
from lqer.run import pipeline
from lqer.run.chunks import Chunk


def test_shares_in_any_order_end_with_what_one_process_makes(experiment, tmp_path):
    config = read_config(experiment.config, "shared")
    assert pipeline.run_chunk(config, Chunk(2, 3)) is None
    assert pipeline.run_chunk(config, Chunk(3, 3)) is None
    shared = pipeline.run_chunk(config, Chunk(1, 3))
    alone = pipeline.run(read_config(experiment.config, "alone", [f"--output_dir={tmp_path / 'elsewhere'}"]))
    assert shared["perplexity"] == alone["perplexity"]
    assert shared["bits"] == alone["bits"]


def test_a_share_that_is_done_already_is_not_done_again(experiment, caplog):
    config = read_config(experiment.config, "again")
    pipeline.run_chunk(config, Chunk(1, 2))
    assert pipeline.run_chunk(config, Chunk(1, 2)) is None
    assert "others are not there yet" in caplog.text


def test_the_quantized_stream_refuses_shares_with_the_reason(experiment):
    config = read_config(experiment.config, "stream", ["--quantize.propagate=quantized"])
    with pytest.raises(ConfigError, match=r"--chunk 1/2: quantize\.propagate is 'quantized': a block's inputs"):
        pipeline.run_chunk(config, Chunk(1, 2))


def test_a_method_that_asks_for_the_quantized_stream_refuses_shares_unless_told_otherwise(experiment, monkeypatch):
    method = read_config(experiment.config, "stream").quantize.method
    monkeypatch.setitem(METHODS, method, dataclasses.replace(METHODS[method], propagate="quantized"))
    with pytest.raises(ConfigError, match=rf"'quantized', for method '{method}'"):
        pipeline.run_chunk(read_config(experiment.config, "stream"), Chunk(1, 2))
    original = read_config(experiment.config, "stream", ["--quantize.propagate=original"])
    assert pipeline.run_chunk(original, Chunk(1, 2)) is None
