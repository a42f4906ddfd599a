"""calibration.keep: whatever is stored of the original model's statistics, the checkpoint has the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from killing import KilledError, dying_workspace

from lqer.config import read_config
from lqer.errors import ConfigError
from lqer.resources import statistics
from lqer.run import pipeline
from lqer.run.chunks import Chunk
from lqer.stages import calibrate
from lqer.store import store

EXACT = ["--quantize.method=qera-exact", "--evaluation.baselines=[]"]
SETTINGS = {
    "magnitudes": ["--quantize.method=lqer-act", "--evaluation.baselines=[]"],
    "hessian": EXACT,
    "rotated": [
        "--quantize.method=caldera", '--quantize.transforms=["hadamard"]', "--quantize.rounding=ldlq",
        "--quantize.low_rank.iterations=1", "--evaluation.baselines=[]",
    ],
    "rounded-inputs": [*EXACT, "--calibration.round_inputs=true"],
    "weighted": [*EXACT, "--calibration.token_weights=residual"],
    "weighted by gradient": [*EXACT, "--calibration.token_weights=gradient"],
    "baseline": ["--quantize.method=qera-exact", '--evaluation.baselines=["rtn"]'],
    "rank-budget": [*EXACT, "--quantize.low_rank={ budget_bits = 7, format = 'x8' }"],
}  # fmt: skip


def run(experiment, *overrides: str, output: Path | None = None, chunk: Chunk | None = None):
    """The run, with an output folder of its own if one is given."""
    elsewhere = [] if output is None else [f"--output_dir={output}"]
    short = "--evaluation.perplexity.max_windows=1"
    return pipeline.run_chunk(read_config(experiment.config, None, [*overrides, short, *elsewhere]), chunk)


def artifacts(output: Path, stage: str) -> dict[str, dict[str, bytes]]:
    return {
        folder.name: {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
        for folder in (output / "store").glob(f"{stage}-*")
    }


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_is_not_stored_is_gathered_with_the_same_bytes(experiment, tmp_path, settings):
    kept, gathered = tmp_path / "kept", tmp_path / "gathered"
    run(experiment, *settings, "--calibration.keep=true", output=kept)
    run(experiment, *settings, "--calibration.keep=false", output=gathered)
    assert len(artifacts(kept, "calibrate")) == 1
    assert not artifacts(gathered, "calibrate")
    for stage in ("quantize", "spectra"):
        assert artifacts(gathered, stage) == artifacts(kept, stage)
    assert artifacts(gathered, "quantize")


@pytest.mark.parametrize("writes", [0, 3, 7, 10])
def test_a_run_killed_without_stored_statistics_walks_on_to_the_same_bytes(experiment, tmp_path, monkeypatch, writes):
    settings = [*EXACT, "--calibration.keep=false"]
    whole = tmp_path / "whole"
    run(experiment, *settings, output=whole)
    monkeypatch.setattr(store, "Workspace", dying_workspace(at_write=writes))
    with pytest.raises(KilledError):
        run(experiment, *settings)
    monkeypatch.undo()
    gathered = []
    observe = calibrate.observe_block
    monkeypatch.setattr(
        calibrate, "observe_block", lambda run, *rest: gathered.append(run.index) or observe(run, *rest)
    )
    run(experiment, *settings)
    assert artifacts(experiment.output, "quantize") == artifacts(whole, "quantize")
    # Blocks with files are run, not observed again.
    assert gathered == [*range(4)][-len(gathered) :]
    assert (len(gathered) < 4) == (writes > 2)


def test_statistics_that_are_there_are_read_whatever_is_asked_for(experiment, monkeypatch):
    run(experiment, *EXACT, "--calibration.keep=true")
    monkeypatch.setattr(calibrate, "observe_block", lambda *arguments: pytest.fail("gathered again"))
    run(experiment, *EXACT, "--calibration.keep=false", "--quantize.low_rank.rank=4")
    assert len(artifacts(experiment.output, "quantize")) == 2


def test_chunks_gather_their_own_blocks(experiment, tmp_path):
    settings = [*EXACT, "--calibration.keep=false"]
    assert run(experiment, *settings, chunk=Chunk(2, 2)) is None
    run(experiment, *settings, chunk=Chunk(1, 2))
    run(experiment, *settings, output=tmp_path / "alone")
    assert artifacts(experiment.output, "quantize") == artifacts(tmp_path / "alone", "quantize")
    assert not artifacts(experiment.output, "calibrate")


def test_auto_keeps_what_is_small_or_read_twice(experiment, monkeypatch):
    run(experiment, *EXACT)
    assert artifacts(experiment.output, "calibrate")
    monkeypatch.setattr(statistics, "KEPT_BYTES", 1000)
    for folder, baselines, count in (("once", "[]", 0), ("twice", '["rtn"]', 1)):
        output = experiment.folder / folder
        run(experiment, "--quantize.method=qera-exact", f"--evaluation.baselines={baselines}", output=output)
        assert len(artifacts(output, "calibrate")) == count


def test_widths_need_stored_statistics(experiment):
    budget = ['--quantize.widths=["w4", "w3"]', "--quantize.budget_bits=4"]
    with pytest.raises(ConfigError, match=r"calibration\.keep: must be \"auto\" or true with quantize\.budget_bits"):
        read_config(experiment.config, None, [*budget, "--calibration.keep=false"])
