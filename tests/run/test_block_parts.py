"""Parts of a method that see a whole decoder block: transforms with their rounding, in one run."""

from __future__ import annotations

import json

import pytest

import lqer
from lqer.config import read_config
from lqer.errors import ConfigError
from lqer.run import pipeline
from lqer.run.chunks import Chunk

INTEGERS = [
    "--formats.w3={ kind = 'int', bits = 3, block_size = 16 }", "--quantize.weight=w3", "--quantize.method=none",
    "--quantize.low_rank.rank=0", "--quantize.activation=none",
            "--quantize.attention=none",
]  # fmt: skip
QUICK_ROUNDING = "{ kind = 'adaptive', steps = 3, soft_fractions = [0.5, 0.1], learning_rate = 2e-2 }"


class TestPartsOfABlock:
    @pytest.mark.figures
    def test_adaptive_rounding_on_awq_and_clipping_is_one_run(self, experiment, run):
        results = run(*INTEGERS, "--quantize.transforms=['awq', 'clip']", f"--quantize.rounding={QUICK_ROUNDING}")
        checkpoint = experiment.output / "tiny" / "checkpoint"
        for index in range(4):
            loss = json.loads((checkpoint / f"tuning-{index:05d}.json").read_text())["loss"]
            assert loss["end"] < loss["start"]
        assert not list(checkpoint.glob("state-*"))
        assert 3 < results["bits"]["average"] < 5
        report = (experiment.output / "tiny" / "report.md").read_text()
        assert "| | original | awq + clip + adaptive | awq + clip + adaptive |" in report
        assert report.count(" → ") == 5  # one in the heading
        assert "Codes changed, mean over the linears of a block: " in report
        assert (experiment.output / "tiny" / "figures/block_loss.png").stat().st_size > 0
        assert "calibrate" not in experiment.stages()

    def test_a_rotated_model_is_evaluated_from_its_checkpoint_and_the_original_from_its_own_folder(
        self, experiment, run
    ):
        """At eight bits the rotated checkpoint is as good as the original: online rotations are in it and are run."""
        eight = "--formats.w3={ kind = 'int', bits = 8, block_size = 16 }"
        results = run(*INTEGERS, eight, "--quantize.transforms=['quarot']", "--evaluation.baselines=['original']")
        assert "rotate" in experiment.stages()
        (row,) = results["perplexity"]
        assert row["quantized"] == pytest.approx(row["original"], rel=2e-3)
        config = json.loads((experiment.output / "tiny/checkpoint/config.json").read_text())
        assert len(config["online_rotations"]) == 8
        assert config["tie_word_embeddings"] is False
        whole = lqer.load_quantized(experiment.output / "tiny/checkpoint", "cpu")
        assert len(whole.model.layers[0].mlp.down_proj._forward_pre_hooks) == 1

    def test_a_rotated_model_runs_blockwise_and_in_the_quantized_stream_too(self, experiment, run):
        common = [*INTEGERS, "--quantize.transforms=['quarot', 'awq']", "--evaluation.baselines=[]"]
        whole = run(*common, f"--quantize.rounding={QUICK_ROUNDING}")
        blockwise = run(
            *common, f"--quantize.rounding={QUICK_ROUNDING}", "--evaluation.blockwise=true", tag="blockwise"
        )
        assert blockwise["perplexity"][0]["quantized"] == pytest.approx(whole["perplexity"][0]["quantized"], rel=1e-4)

    def test_a_share_of_a_run_with_parts_of_a_block_is_refused(self, experiment):
        config = read_config(experiment.config, None, [*INTEGERS, "--quantize.transforms=['awq']"])
        with pytest.raises(ConfigError, match=r"--chunk 1/2: requires quantize\.propagate_error .*implied by awq"):
            pipeline.run_chunk(config, Chunk(1, 2))
