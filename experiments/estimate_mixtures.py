"""Memory that a run needs for the decoder blocks of large mixtures of experts on a GPU, from their shapes alone.

    python experiments/estimate_mixtures.py [--shapes deepseek-v3 kimi-k2 gpt-oss-120b deepseek-v4-flash]
        [--methods lqer-act gptq best-3] [--windows 32] [--seq-len 2048] [--max-memory 4GB]

Nothing is read or run: the numbers are those that `--validate` prints and refuses by, of the stage up to the finished
checkpoint that needs most, for the published files (FP8 in blocks of 128, MXFP4) with two decoder blocks, one of them
without experts where the model has such blocks. They do not grow with the number of blocks.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline_benchmark.mixture import SHAPES
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lqer.config import read_config
from lqer.config.plan import plan_model
from lqer.models.source import ModelSource
from lqer.models.summary import ModelSummary, summarize_model
from lqer.resources.memory import estimate
from lqer.resources.workload import Need, StageMemory, Workload, total

ROOT = Path(__file__).parents[1]
PUBLISHED = ["gpt-oss-120b", "deepseek-v3", "kimi-k2", "deepseek-v4-flash"]
HALF = 2  # bytes
STAGES = ("token_weights", "calibrate", "widths", "quantize")


def stages_of(name: str, method: str, windows: int, seq_len: int, max_memory: str) -> list[StageMemory]:
    """What stages before evaluation need for a shape, by a preset of configs/methods."""
    kind, sizes, bits = SHAPES[name]
    model = AutoConfig.for_model(kind, **sizes)
    model.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        summary = summarize_model(ModelSource(name, folder, None, "", ""))
        calibration = {"num_samples": windows, "seq_len": seq_len, "max_memory": max_memory}
        overrides = [f"--model={folder}", *(f"--calibration.{key}={value}" for key, value in calibration.items())]
        config = read_config(ROOT / "configs" / "methods" / f"{method}.toml", overrides=overrides)
    plans = plan_model(config, summary)
    work = Workload(config, summary, plans, HALF, HALF, on_gpu=True, streams=True, read_block=_read(summary, bits))
    return [stage for stage in estimate(work) if stage.name in STAGES]


def _read(summary: ModelSummary, bits: tuple[float, float]) -> int:
    """Bytes of the largest block as it is stored: of its linears, next to which the rest is nothing."""
    blocks = [f"{summary.blocks_name}.{index}." for index in range(summary.blocks)]
    sizes = [
        sum(bits[".experts." not in name] * rows * columns / 8 for name, (rows, columns) in summary.linears.items()
            if name.startswith(block))
        for block in blocks
    ]  # fmt: skip
    return int(max(sizes))


def row(name: str, method: str, stages: Sequence[StageMemory]) -> str:
    """Of a Markdown table: the most that is held in RAM and on the GPU by a stage, and the largest of it, in GB."""
    most = [max(places, key=total) for places in zip(*((stage.ram, stage.device) for stage in stages), strict=True)]
    return f"| {name} | {method} | {' | '.join(map(_cell, most))} |"


def _cell(needs: Sequence[Need]) -> str:
    largest = sorted((need for need in needs if need.bytes > 1e9), key=lambda need: -need.bytes)
    named = ", ".join(f"{need.what} {need.bytes / 1e9:.1f}" for need in largest)
    return f"{total(needs) / 1e9:.1f}" + f" ({named})" * bool(largest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=PUBLISHED)
    parser.add_argument("--methods", nargs="+", default=["lqer-act", "gptq", "best-3"])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--max-memory", default="4GB", help="calibration.max_memory")
    given = parser.parse_args()
    print("| shape | method | RAM, GB | GPU, GB |\n|---|---|---|---|")
    for name in given.shapes:
        for method in given.methods:
            print(
                row(name, method, stages_of(name, method, given.windows, given.seq_len, given.max_memory)), flush=True
            )


if __name__ == "__main__":
    main()
