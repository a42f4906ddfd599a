"""What a run writes does not depend on when it is written: behind the work, or before the work goes on."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from lqer.config import read_config
from lqer.run import pipeline
from lqer.store.records import MANIFEST
from lqer.store.workspace import Workspace

EXACT = ["--quantize.method=qera-exact"]
SETTINGS = {
    "kept-statistics": [*EXACT, "--calibration.keep=true"],
    "gathered-on-the-way": [*EXACT, "--calibration.keep=false"],
    "error-propagation": ["--quantize.propagate_error=true"],
    "learned-rounding": [
        "--formats.i3={ kind = 'int', bits = 3, block_size = 32 }", "--quantize.weight=i3",
        "--quantize.low_rank.rank=4", '--quantize.transforms=["awq", "clip"]',
        "--quantize.rounding={ kind = 'adaptive', soft_fractions = [0.5, 0.2], steps = 3, batch_size = 2 }",
    ],
}  # fmt: skip


def stored_bytes(experiment, output: Path, settings: list[str]) -> dict[str, bytes]:
    """Run it. Returns every file of every artifact, but for the seconds in manifests."""
    short = ["--evaluation.baselines=[]", "--evaluation.perplexity.max_windows=1", f"--output_dir={output}"]
    pipeline.run(read_config(experiment.config, None, [*settings, *short]))
    files = [file for file in output.glob("store/*/*") if file.name != MANIFEST]
    return {file.relative_to(output).as_posix(): file.read_bytes() for file in files}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_files_written_behind_the_work_have_the_bytes_of_those_it_waits_for(
    experiment, tmp_path, monkeypatch, settings
):
    behind = stored_bytes(experiment, tmp_path / "behind", settings)
    monkeypatch.setattr(Workspace, "writing_behind", lambda workspace, most_waiting: nullcontext())
    waited = stored_bytes(experiment, tmp_path / "waited", settings)
    assert any(name.startswith("store/quantize-") for name in behind)
    assert behind == waited
