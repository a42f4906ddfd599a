"""Seconds and memory of calibrating and quantizing the decoder blocks of a mixture of experts, random weights and text.

    python experiments/benchmark_experts.py [--shape qwen3-30b-a3b] [--blocks 4] [--methods lqer-act gptq best-3]
        [--windows 16] [--seq-len 2048] [--batch 4] [--seconds 100] [--most N] [--phases] [--device auto]
        [--folder /dev/shm]

What the stages of a run do, with their files in a temporary folder of --folder: lqer-act on the original model's
inputs, gptq on those of the blocks quantized before it, best-3 as its preset says, which measures a width of 2 to 4
bits for every linear and takes its linears in turn. Seconds by phase are those of the main thread, in which a phase
that asks a GPU for a number waits for what others have launched; with --phases the GPU is waited for wherever one
begins or ends, which takes longer. A method is not begun after --seconds; an interrupt, or --most seconds of a method,
tells what is done so far. Shapes: tiny, qwen3-30b-a3b, gpt-oss-20b.
"""

from __future__ import annotations

import argparse
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lqer.formats import Int, MXInt, Trellis
from lqer.methods import METHODS, LinearPlan
from lqer.models.backward import walk_backward
from lqer.models.loaders import OpenedModel
from lqer.models.source import pick_device
from lqer.models.structure import block_linears, find_blocks, prepare_model
from lqer.phases import Recorder, phase, recorded
from lqer.report.environment import device_name
from lqer.rounding import Gptq
from lqer.rounding.ldlq import Ldlq
from lqer.stages.allocate_widths import allocate, options_of
from lqer.stages.calibrate import calibrate, gather_blocks
from lqer.stages.gather import CalibrationText
from lqer.stages.measure_widths import WINDOWS, measure_widths, plans_to_measure
from lqer.stages.quantize import quantize_blocks
from lqer.stages.quantize_linears import QuantizeSettings, requested_statistics
from lqer.stages.quantize_sequential import quantize_in_order
from lqer.store.names import block_file, layers_file, sites_file
from lqer.store.offload import Offload
from lqer.store.store import Store, Workspace
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
LQER_ACT = LinearPlan(METHODS["lqer-act"](), MXInt(4), activation=MXInt(8), rank=32, factor=MXInt(8))
GPTQ = LinearPlan(METHODS["gptq"](), Int(4, 128), rounding=Gptq())
# Of the preset best-3.
WIDTHS = (Trellis(2), Trellis(3), Trellis(4))
BUDGET_BITS = 3.01
BEST_3 = LinearPlan(METHODS["none"](), Trellis(3), rounding=Ldlq(), transform=Hadamard())


def random_model(shape: str, blocks: int, device: torch.device) -> PreTrainedModel:
    """A bfloat16 model, made on the device."""
    kind, sizes = SHAPES[shape]
    config = AutoConfig.for_model(kind, **{**COMMON, **sizes, "num_hidden_layers": blocks})
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    prepare_model(model)
    return model.eval()


def linears_of(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    name, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        yield from ((f"{name}.{index}.{key}", linear) for key, linear in block_linears(block).items())


def plans_for(model: PreTrainedModel, plan: LinearPlan) -> dict[str, LinearPlan | None]:
    return {name: plan for name, _ in linears_of(model)}


def lqer_act(folder: Path, opened: OpenedModel, text: CalibrationText) -> Workspace:
    workspace, settings = Workspace(folder), QuantizeSettings(plans_for(opened.model, LQER_ACT), None, seed=0)
    requested = requested_statistics(settings.plans)
    quantize_blocks(
        workspace,
        range(len(opened.blocks)),
        opened,
        lambda indices: gather_blocks(opened, text, requested, {}, indices),
        settings,
    )
    return workspace


def gptq(folder: Path, opened: OpenedModel, text: CalibrationText) -> Workspace:
    workspace = Workspace(folder)
    quantize_in_order(workspace, opened, opened, text, QuantizeSettings(plans_for(opened.model, GPTQ), None, seed=0))
    return workspace


def best_3(folder: Path, opened: OpenedModel, text: CalibrationText) -> Workspace:
    plans, store = plans_for(opened.model, BEST_3), Store(folder / "store")
    choices, requested = dict.fromkeys(plans, WIDTHS), requested_statistics(plans)
    calibration = store.obtain("calibrate", 0, lambda ws: calibrate(ws, opened, text, requested))
    measurable = plans_to_measure(plans, choices)
    runs = walk_backward(opened, text.windows_WT[:WINDOWS], text.batch_size, seed=0)
    with phase("widths"):
        of_widths = store.obtain("widths", 0, lambda ws: measure_widths(ws, runs, calibration, measurable, WIDTHS))
    blocks = range(len(opened.blocks))
    losses = {key: loss.tolist() for index in blocks for key, loss in of_widths.tensors(block_file(index)).items()}
    sites = {key: site for index in blocks for key, site in calibration.json(sites_file(index)).items()}
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears_of(opened.model)}
    options = options_of(plans, choices)
    found = allocate(plans, options, {name: losses[f"{name}.losses"] for name in plans}, sites, shapes, BUDGET_BITS)
    workspace, settings = Workspace(folder), QuantizeSettings(found.plans, None, seed=0, order="sequential")
    quantize_in_order(workspace, opened, opened, text, settings)
    return workspace


METHOD_RUNS: dict[str, Callable[[Path, OpenedModel, CalibrationText], Workspace]] = {
    "lqer-act": lqer_act, "gptq": gptq, "best-3": best_3,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--methods", nargs="+", choices=METHOD_RUNS, default=[*METHOD_RUNS])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--most", type=int, default=0)
    parser.add_argument("--phases", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    started, device = time.perf_counter(), pick_device(given.device)
    model = random_model(given.shape, given.blocks, device)
    windows_WT = torch.randint(4096, (given.windows, given.seq_len), generator=torch.Generator().manual_seed(0))
    text = CalibrationText(windows_WT, given.batch, 256)
    opened = OpenedModel.resident(model, device, Offload())
    print(
        f"{device_name(device)}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; {given.shape}, {given.blocks} "
        f"blocks, {windows_WT.numel()} tokens, files in {given.folder}, made in {time.perf_counter() - started:.1f} s"
    )
    print("| method | blocks | linears | seconds | of them by phase | bits | peak, GB | fewest tokens of an expert |")
    print("|---|---|---|---|---|---|---|---|")
    for method in given.methods:
        if time.perf_counter() - started < given.seconds:
            print(f"| {method} | {measured(opened, text, given, METHOD_RUNS[method])} |", flush=True)


def measured(
    opened: OpenedModel,
    text: CalibrationText,
    given: argparse.Namespace,
    run: Callable[[Path, OpenedModel, CalibrationText], Workspace],
) -> str:
    """The cells of one method."""
    device = opened.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    recorder, started = Recorder(lambda: now(device) if given.phases else None), now(device)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        signal.alarm(given.most)
        try:
            with recorded(recorder):
                run(Path(folder), opened, text)
        except KeyboardInterrupt:
            print("interrupted")
        finally:
            signal.alarm(0)
        seconds, workspace = now(device) - started, Workspace(Path(folder))
        done = [index for index in range(len(opened.blocks)) if block_file(index) in workspace]
        rows = [row for index in done for row in workspace.json(layers_file(index))]
    by_phase = dict(recorder.main.most_common()) | {"other": seconds - sum(recorder.main.values())}
    phases = ", ".join(f"{name} {taken:.1f}" for name, taken in by_phase.items() if taken >= 0.05)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else float("nan")
    weights = sum(row["out_features"] * row["in_features"] for row in rows)
    bits = sum(row["weight_bits"] + row["metadata_bits"] + row["low_rank_bits"] for row in rows) / max(weights, 1)
    fewest = min((row["routed_tokens"] for row in rows if "routed_tokens" in row), default=0)
    return f"{len(done)} | {len(rows)} | {seconds:.1f} | {phases} | {bits:.3f} | {peak:.1f} | {fewest}"


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
