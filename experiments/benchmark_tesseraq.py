"""What adaptive rounding gains over where it starts, block by block, on text that it was not trained on.

    python experiments/benchmark_tesseraq.py MODEL TEXT [--bits 2] [--group 32] [--rounds 20] [--steps 50]

MODEL is anything that a config's `model` may be, TEXT a .txt or .jsonl file whose first windows calibrate and whose
next ones are held out. Four copies of the model are quantized, each block on what the quantized blocks before it hand
on: to nearest, with AWQ's scales, with clipping too, and by TesseraQ from there. Block losses are squared errors of the
block's output per token of the held-out windows, against the original block on the original stream.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from lqer.data import DatasetSpec, calibration_windows, load_rows
from lqer.errors import LqerError
from lqer.formats import Int, MXInt, NumberFormat, QuantizedTensor
from lqer.models import block_linears, find_blocks, load_model, load_tokenizer, pick_device, resolve_model
from lqer.report.environment import device_name
from lqer.rounding.adaptive import AdaptiveSettings, AdaptiveState, block_loss, round_block
from lqer.rounding.par_schedule import soft_shares
from lqer.transforms.awq import scale_block
from lqer.transforms.block_function import BlockFunction
from lqer.transforms.clip import SHRINK_FACTORS, quantize_clipped, search_clipping

CANDIDATES = ("nearest", "awq", "awq+clip", "tesseraq")
# AWQ does not clip what the softmax compares.
NOT_CLIPPED = ("q_proj", "k_proj")


@dataclass
class Stream:
    """Hidden states of the calibration and of the held-out windows, (S, T, D) each."""

    calibration: Tensor
    held_out: Tensor

    @torch.no_grad()
    def through(self, call: BlockFunction, batch_size: int) -> Stream:
        return Stream(
            *(
                torch.cat([call({}, hidden) for hidden in part.split(batch_size)])
                for part in (self.calibration, self.held_out)
            )
        )


def record_calls(model: PreTrainedModel, blocks: nn.ModuleList, windows_WT: Tensor, batch_size: int) -> Any:
    """What enters the first block, (W, T, D), and the rest of every block's call at that batch size."""
    entering, calls = [], {}

    def record(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if index == 0:
                entering.append(args[0])
            calls[index] = (args[1:], kwargs)

        return hook

    hooks = [block.register_forward_pre_hook(record(i), with_kwargs=True) for i, block in enumerate(blocks)]
    with torch.no_grad():
        for ids_BT in windows_WT.split(batch_size):
            model.base_model(input_ids=ids_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.cat(entering), calls


@torch.no_grad()
def autocorrelations(block: nn.Module, call: BlockFunction, hidden_STD: Tensor, batch_size: int) -> dict[str, Tensor]:
    """E[x xᵀ] up to scale at every linear, float32."""
    sums: dict[str, Tensor] = {}

    def add(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x_NI = args[0].flatten(0, -2).float()
            sums[name] = sums.get(name, 0) + x_NI.T @ x_NI

        return hook

    hooks = [linear.register_forward_pre_hook(add(name)) for name, linear in block_linears(block).items()]
    for hidden_BTD in hidden_STD.split(batch_size):
        call({}, hidden_BTD)
    for hook in hooks:
        hook.remove()
    return sums


@torch.no_grad()
def held_out_loss(
    call: BlockFunction, weights: Mapping[str, Tensor], inputs: Tensor, targets: Tensor, size: int
) -> float:
    pairs = zip(inputs.split(size), targets.split(size), strict=True)
    return sum(float(block_loss(call(weights, x), y)) * len(x) for x, y in pairs) / len(inputs)


@torch.no_grad()
def start_of(
    candidate: str, block: nn.Module, call: BlockFunction, hidden_STD: Tensor, weight_format: NumberFormat, size: int
) -> dict[str, QuantizedTensor]:
    """The block's linears rounded to nearest, scaled and clipped as the candidate says; scales go into `block`."""
    linears = block_linears(block)
    if candidate != "nearest":
        changed, _ = scale_block(call, hidden_STD.split(size), dict.fromkeys(linears, weight_format))
        for name, tensor in changed.items():
            block.get_parameter(name).copy_(tensor)
    if candidate not in ("awq+clip", "tesseraq"):
        return {f"{name}.weight": weight_format.quantize(linear.weight) for name, linear in linears.items()}
    squares = autocorrelations(block, call, hidden_STD, size)
    starts = {}
    for name, linear in linears.items():
        factor_ON = search_clipping(
            linear.weight, squares[name], weight_format, (1.0,) if name.endswith(NOT_CLIPPED) else SHRINK_FACTORS
        )
        starts[f"{name}.weight"] = quantize_clipped(linear.weight, weight_format, factor_ON, factor_ON)
    return starts


def run(
    candidate: str, model: PreTrainedModel, windows_WT: Tensor, weight_format: NumberFormat, arguments: Any
) -> float:
    """Quantize a copy of the model, print its block losses, return its perplexity on the held-out windows."""
    size = arguments.batch_size
    original_model, model = model, copy.deepcopy(model)
    _, originals = find_blocks(original_model)
    _, blocks = find_blocks(model)
    entering, calls = record_calls(original_model, originals, windows_WT, size)
    original = Stream(*entering.split(arguments.windows))
    quantized = original
    settings = AdaptiveSettings(
        soft_shares=soft_shares(arguments.bits)[-arguments.rounds :],
        steps=arguments.steps,
        batch_size=size,
        micro_batch=size,
        learning_rate=arguments.learning_rate,
        scale_learning_rate=arguments.scale_learning_rate,
    )
    for index, block in enumerate(blocks):
        started = time.perf_counter()
        args, kwargs = calls[index]
        targets = original.through(BlockFunction(originals[index], args, kwargs), size)
        call = BlockFunction(block, args, kwargs)
        rounded = start_of(candidate, block, call, quantized.calibration, weight_format, size)
        losses = [held_out_loss(call, values(rounded), quantized.held_out, targets.held_out, size)]
        if candidate == "tesseraq":
            weights = {name: block.get_parameter(name).detach().clone() for name in rounded}
            with tqdm(total=len(settings.soft_shares), desc=f"block {index}", unit="round", leave=False) as bar:

                def show(state: AdaptiveState, bar: tqdm = bar) -> None:
                    bar.set_postfix(loss=float(state.losses[-1]))
                    bar.update()

                rounded = round_block(
                    weights, rounded, call, quantized.calibration, targets.calibration, settings, after_round=show
                )
            losses.append(held_out_loss(call, values(rounded), quantized.held_out, targets.held_out, size))
        with torch.no_grad():
            for name, tensor in rounded.items():
                block.get_parameter(name).copy_(tensor.dequantize())
        shown = " -> ".join(f"{loss:.5f}" for loss in losses)
        print(f"{candidate:9} block {index}: held-out loss {shown}   {time.perf_counter() - started:.0f} s", flush=True)
        original, quantized = targets, quantized.through(BlockFunction(block, args, kwargs), size)
    return perplexity(model, windows_WT[arguments.windows :], size)


def values(rounded: Mapping[str, QuantizedTensor]) -> dict[str, Tensor]:
    return {name: tensor.dequantize() for name, tensor in rounded.items()}


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows_WT: Tensor, batch_size: int) -> float:
    losses = [
        float(model(input_ids=ids, labels=ids, use_cache=False).loss) * len(ids) for ids in windows_WT.split(batch_size)
    ]
    return math.exp(sum(losses) / len(windows_WT))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--kind", choices=["int", "mxint"], default="int")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group", type=int, default=32, help="weights that share a scale; -1 for a whole row")
    parser.add_argument("--windows", type=int, default=64, help="of calibration")
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--scale-learning-rate", type=float, default=1e-3)
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=CANDIDATES)
    arguments = parser.parse_args()
    kind = Int if arguments.kind == "int" else MXInt
    weight_format = kind(bits=arguments.bits, block_size=arguments.group)
    device = pick_device("auto")
    try:
        source = resolve_model(arguments.model)
        model = load_model(source, torch.float32, device)
        rows = load_rows(DatasetSpec(path=arguments.text), "calibration")
        windows = arguments.windows + arguments.held_out
        windows_WT = calibration_windows(load_tokenizer(source), rows, windows, arguments.seq_len).to(device)
    except LqerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{source.name}, {weight_format}, {device_name(device)}, {torch.get_num_threads()} threads, {vars(arguments)}"
    )
    found = {"original": perplexity(model, windows_WT[arguments.windows :], arguments.batch_size)}
    for candidate in arguments.candidates:
        found[candidate] = run(candidate, model, windows_WT, weight_format, arguments)
    print("perplexity: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
