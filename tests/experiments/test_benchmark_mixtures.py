"""The benchmark of large mixtures: checkpoints as they are published, and what a process cannot give back."""

from __future__ import annotations

import sys
from pathlib import Path

import benchmark_mixtures as benchmark
import pytest
import torch
from pipeline_benchmark.checkpoint import byte_tokenizer
from pipeline_benchmark.mixture import write_mixture
from transformers import PreTrainedConfig

from lqer.models.loaders import Streamed
from lqer.models.source import resolve_model
from lqer.models.streaming import open_model
from lqer.models.structure import block_linears

CPU = torch.device("cpu")
MB = 10**6


def small(name: str) -> PreTrainedConfig:
    """With widths that are no multiples of FP8's blocks, and a small vocabulary."""
    config = benchmark.shape_of(name, 64, 4)
    config.vocab_size = 300
    return config


@pytest.mark.parametrize(("name", "linears"), [("deepseek-v3", (5 + 3, 5 + 3 + 4 * 3)), ("gpt-oss-120b", (16, 16))])
def test_random_checkpoints_are_read_block_by_block_in_their_codes(name, linears, tmp_path):
    config = small(name)
    if name == "gpt-oss-120b":
        config.hidden_size = config.intermediate_size = 64
        config.num_attention_heads = config.num_key_value_heads = 1
    stored = write_mixture(tmp_path / "model", config, byte_tokenizer(), CPU)
    assert 0 < stored < sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    opened = open_model(resolve_model(str(tmp_path / "model")), "auto", CPU)
    assert isinstance(opened.loader, Streamed)
    for index, block in opened.loader.load_each(opened.blocks, range(2), CPU):
        found = block_linears(block)
        assert len(found) == linears[index]
        for linear in found.values():
            assert linear.weight.dtype == torch.bfloat16
            assert 0.001 < linear.weight.float().std() < 0.1


class Clock:
    """Begins once a process says that it holds what it will, and goes on by a second for each look."""

    def __init__(self, begins: Path):
        self.begins, self.seconds = begins, 0

    def monotonic(self) -> int:
        self.seconds += self.begins.exists()
        return self.seconds


def test_pages_of_files_do_not_count_and_a_run_is_stopped_in_time(tmp_path, monkeypatch):
    """100 MB of a mapped file, then as many of its own."""
    holds = tmp_path / "holds"
    code = f"""
import mmap, time
from pathlib import Path
with open({str(tmp_path / "file")!r}, "wb+") as file:
    file.write(bytes(100 * {MB}))
    file.flush()
    mapped = mmap.mmap(file.fileno(), 0)
    read = sum(mapped[::4096])
    {{held}}
    Path({str(holds)!r}).touch()
    time.sleep(600)
"""
    peaks = []
    for held in ("pass", f"held = bytearray(b'x') * (100 * {MB})"):
        holds.unlink(missing_ok=True)
        clock = Clock(holds)
        monkeypatch.setattr(benchmark, "time", clock)
        command = [sys.executable, "-c", code.format(held=held)]
        peaks.append(benchmark.watch(command, tmp_path, tmp_path / "errors.txt", CPU, most_seconds=2))
        # The first look after the second second.
        assert clock.seconds == 3
    assert [peak.status for peak in peaks] == [None, None]
    without, with_held = (max(peak.own.values()) for peak in peaks)
    assert without < 60 * MB
    assert 100 * MB < with_held < 160 * MB
