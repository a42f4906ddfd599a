"""Seconds and memory of calibrating and quantizing the decoder blocks of a mixture of experts, random weights and text.

    python experiments/benchmark_experts.py [--shape qwen3-30b-a3b] [--blocks 4] [--methods lqer-act gptq]
        [--windows 16] [--seq-len 2048] [--batch 4] [--seconds 100] [--device auto]

A block is gathered from and quantized as a run without kept statistics does it, its packed file written to a temporary
folder. Methods take turns, block by block, until --seconds are over. Shapes: tiny, qwen3-30b-a3b, gpt-oss-20b.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lqer.formats import Int, MXInt, Trellis
from lqer.methods import METHODS, LinearPlan
from lqer.models.loaders import OpenedModel
from lqer.models.source import pick_device
from lqer.models.structure import block_linears, prepare_model
from lqer.models.walker import walk_blocks
from lqer.report.environment import device_name
from lqer.rounding import Gptq
from lqer.rounding.ldlq import Ldlq
from lqer.stages.gather import CalibrationText, observe_block
from lqer.stages.quantize import BlockWork, QuantizeSettings, quantize_linears, requested_statistics, write_block
from lqer.store.offload import Offload
from lqer.store.store import Workspace
from lqer.transforms import Hadamard

# The vocabulary is cut: nothing outside the blocks is measured.
COMMON: dict[str, Any] = {"vocab_size": 4096, "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 0}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("qwen3_moe", {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
                           "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}),
    "qwen3-30b-a3b": ("qwen3_moe", {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128,
                                    "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4,
                                    "head_dim": 128}),
    "gpt-oss-20b": ("gpt_oss", {"hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32,
                                "num_experts_per_tok": 4, "num_attention_heads": 64, "num_key_value_heads": 8,
                                "head_dim": 64}),
}  # fmt: skip
PLANS = {
    "lqer-act": LinearPlan(METHODS["lqer-act"](), MXInt(4), rank=32, factor=MXInt(8)),
    "gptq": LinearPlan(METHODS["gptq"](), Int(4, 128), rounding=Gptq()),
    "best-3": LinearPlan(METHODS["none"](), Trellis(3, 14), rounding=Ldlq(), transform=Hadamard()),
}


def random_model(shape: str, blocks: int, device: torch.device) -> PreTrainedModel:
    """A bfloat16 model, made on the device."""
    kind, sizes = SHAPES[shape]
    config = AutoConfig.for_model(kind, **{**COMMON, **sizes, "num_hidden_layers": blocks})
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    prepare_model(model)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--methods", nargs="+", choices=PLANS, default=[*PLANS])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    started, device = time.perf_counter(), pick_device(given.device)
    model = random_model(given.shape, given.blocks, device)
    windows_WT = torch.randint(4096, (given.windows, given.seq_len), generator=torch.Generator().manual_seed(0))
    text = CalibrationText(windows_WT, given.batch, 256)
    opened = OpenedModel.resident(model, device, Offload())
    print(
        f"{device_name(device)}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; {given.shape}, "
        f"{windows_WT.numel()} tokens, made in {time.perf_counter() - started:.1f} s"
    )
    print("| block | method | linears | gather, s | quantize, s | peak, GB | fewest tokens of an expert |")
    print("|---|---|---|---|---|---|---|")
    for run in walk_blocks(opened, windows_WT, given.batch):
        for method in given.methods:
            if time.perf_counter() - started < given.seconds:
                print(f"| {run.index} | {method} | {measured(opened, run, text, PLANS[method])} |", flush=True)
        run.forward()


def measured(opened: OpenedModel, run: Any, text: CalibrationText, plan: LinearPlan) -> str:
    """The cells of one block and method."""
    linears, device = list(block_linears(run.block)), run.device
    settings = QuantizeSettings({f"{run.name}.{name}": plan for name in linears}, None, seed=0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [now(device)]
    statistics = observe_block(run, None, text, requested_statistics(settings.plans))
    times.append(now(device))
    work = BlockWork(run.index, run.name, linears, run.block.state_dict(), with_spectra=False)
    with tempfile.TemporaryDirectory() as folder:
        write_block(
            Workspace(Path(folder)), work, found := quantize_linears(work, linears, statistics, settings, device)
        )
    times.append(now(device))
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else float("nan")
    gathering, quantizing = (after - before for before, after in itertools.pairwise(times))
    fewest = min(row["routed_tokens"] for row in found.rows if "routed_tokens" in row)
    return f"{len(linears)} | {gathering:.1f} | {quantizing:.1f} | {peak:.1f} | {fewest}"


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
