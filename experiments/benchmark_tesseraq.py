"""What adaptive rounding gains over where it starts, block by block, on text that it was not trained on.

    python experiments/benchmark_tesseraq.py MODEL TEXT [--bits 2] [--group 32] [--rounds 20] [--steps 50] [--blocks 6]

MODEL is anything that a config's `model` may be, TEXT a .txt or .jsonl file whose first windows calibrate and whose
next ones are held out. Copies of the model are quantized by the parts that a configuration names, each block on what
the quantized blocks before it hand on: to nearest, with AWQ's scales, with clipping too, and by TesseraQ from there.
Block losses are squared errors of the block's output per token of the held-out windows, against the original block on
the original stream. Perplexities are those of the held-out windows, where all blocks are quantized.

Shapes: S sequences, W windows, T tokens, D hidden size.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from lqer.data.datasets import DatasetSpec, calibration_windows, load_rows
from lqer.errors import LqerError
from lqer.formats import Int, MXInt, NumberFormat, QuantizedTensor
from lqer.methods.block import output_loss, reconstruct_block
from lqer.models.source import load_model, load_tokenizer, pick_device, resolve_model
from lqer.models.structure import block_linears, find_blocks
from lqer.report.environment import device_name
from lqer.rounding import Adaptive
from lqer.rounding.par_schedule import soft_shares
from lqer.transforms import Awq, BlockTransform, Clip
from lqer.transforms.block_function import BlockFunction
from lqer.transforms.block_problem import BlockProblem

TRANSFORMS: dict[str, list[BlockTransform]] = {
    "nearest": [],
    "awq": [Awq()],
    "awq+clip": [Awq(), Clip()],
    "tesseraq": [Awq(), Clip()],
}


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


def run(
    candidate: str, model: PreTrainedModel, windows_WT: Tensor, weight_format: NumberFormat, arguments: Any
) -> float | None:
    """Quantize a copy of the model, print its block losses, return its perplexity on the held-out windows."""
    size = arguments.batch_size
    original_model, model = model, copy.deepcopy(model)
    _, originals = find_blocks(original_model)
    _, blocks = find_blocks(model)
    entering, calls = record_calls(original_model, originals, windows_WT, size)
    original = Stream(*entering.split(arguments.windows))
    quantized = original
    rounding = Adaptive(
        steps=arguments.steps,
        batch_size=size,
        learning_rate=arguments.learning_rate,
        scale_learning_rate=arguments.scale_learning_rate,
        soft_shares=soft_shares(arguments.bits)[-arguments.rounds :],
    )
    for index, block in enumerate(blocks[: arguments.blocks]):
        started = time.perf_counter()
        args, kwargs = calls[index]
        targets = original.through(BlockFunction(originals[index], args, kwargs), size)
        call = BlockFunction(block, args, kwargs)
        formats = dict.fromkeys(block_linears(block), weight_format)
        autocast = torch.bfloat16 if block_device(block).type == "cuda" else None
        problem = BlockProblem(call, quantized.calibration, targets.calibration, formats, size, autocast)
        held_out = replace(problem, inputs_STD=quantized.held_out, targets_STD=targets.held_out)
        start = reconstruct_block(problem, TRANSFORMS[candidate], None)
        parameters = start.parameters
        rounded: Mapping[str, QuantizedTensor] = {
            name: start.rounded.get(name) or weight_format.quantize(weight(block, parameters, name)) for name in formats
        }
        losses = [output_loss(held_out, parameters, rounded)]
        if candidate == "tesseraq":
            with tqdm(total=arguments.rounds, desc=f"block {index}", unit="round", leave=False) as bar:

                def show(part: str, done: int, total: int, loss: float | None, bar: tqdm = bar) -> None:
                    if part == "rounding":
                        bar.set_postfix(loss=loss)
                        bar.update()

                tuned = reconstruct_block(problem, TRANSFORMS[candidate], rounding, progress=show)
            parameters, rounded = tuned.parameters, tuned.rounded
            losses.append(output_loss(held_out, parameters, rounded))
        with torch.no_grad():
            for name, tensor in {**parameters, **values(rounded)}.items():
                block.get_parameter(name).copy_(tensor)
        shown = " -> ".join(f"{loss:.5f}" for loss in losses)
        print(f"{candidate:9} block {index}: held-out loss {shown}   {time.perf_counter() - started:.0f} s", flush=True)
        original, quantized = targets, quantized.through(BlockFunction(block, args, kwargs), size)
    return perplexity(model, windows_WT[arguments.windows :], size) if arguments.blocks is None else None


def weight(block: nn.Module, parameters: Mapping[str, Tensor], linear: str) -> Tensor:
    name = f"{linear}.weight"
    return parameters.get(name, block.get_parameter(name)).detach()


def block_device(block: nn.Module) -> torch.device:
    return next(block.parameters()).device


def values(rounded: Mapping[str, QuantizedTensor]) -> dict[str, Tensor]:
    return {f"{name}.weight": tensor.dequantize() for name, tensor in rounded.items()}


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
    parser.add_argument("--group", type=int, default=32, help="weights that share a scale")
    parser.add_argument("--windows", type=int, default=64, help="of calibration")
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--scale-learning-rate", type=float, default=1e-3)
    parser.add_argument("--candidates", nargs="+", choices=[*TRANSFORMS], default=[*TRANSFORMS])
    parser.add_argument("--blocks", type=int, help="only the first ones: losses without perplexities")
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
    print(f"{source.name}, {weight_format}, {device_name(device)}, {vars(arguments)}")
    found: dict[str, float | None] = {
        "original": perplexity(model, windows_WT[arguments.windows :], arguments.batch_size)
    }
    for candidate in arguments.candidates:
        found[candidate] = run(candidate, model, windows_WT, weight_format, arguments)
    shown = [f"{name} {value:.3f}" for name, value in found.items() if value is not None]
    print("perplexity: " + ", ".join(shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
