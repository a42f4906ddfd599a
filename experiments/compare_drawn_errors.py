"""How near the errors of trellis codes that are drawn from their law are to those that a search makes, on a real model.

    python experiments/compare_drawn_errors.py MODEL --text FILE [--blocks 0 14 29] [--rows 192] [--state-bits 12]
        [--num-samples 16] [--windows 4] [--seq-len 512] [--device auto] [--json FILE]

Δ is what the errors of a linear add to the loss (lqer/stages/measure_widths.py). Codes of 1 to 4 bits are searched for
on so many rows of every linear of the blocks, by LDLQ after Hadamard transforms, under statistics of the first windows;
gradients are taken on the windows after them. Prints three tables as markdown: by bits, Δ of drawn errors over that of
searched ones, over the linears; by block, the same of the mean squares of the errors themselves; by budget, how many
linears get another width by drawn errors, and the searched Δ of that choice over that of the choice by searched ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lqer.data.datasets import DatasetSpec, calibration_windows, load_rows
from lqer.errors import LqerError
from lqer.formats import Trellis
from lqer.methods import LinearPlan, RoundingOnly
from lqer.models.backward import BackwardRun, walk_backward
from lqer.models.loaders import OpenedModel
from lqer.models.source import load_model, load_tokenizer, pick_device, resolve_model
from lqer.models.structure import block_linears
from lqer.report.environment import device_name
from lqer.rounding import Ldlq
from lqer.rounding.width_allocation import Curve, allocate_widths
from lqer.stages.calibrate import calibrate
from lqer.stages.gather import BlockStatistics, CalibrationText
from lqer.stages.measure_widths import added_losses
from lqer.stages.width_errors import Sampled, errors_of
from lqer.statistics import Hessian
from lqer.store.offload import Offload
from lqer.store.store import Artifact, Store
from lqer.transforms import Hadamard

BATCH_SIZE, ERROR_TOKENS, SEED = 2, 1, 0
BITS = (1, 2, 3, 4)
BUDGETS = (1.5, 2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5)  # bits of a weight
WAYS = ("searched", "drawn")


@dataclass
class Found:
    """Of one linear, by way: Δ by width (float64, nats per token), mean squares of errors, and seconds to find them."""

    name: str
    block: int
    weights: int
    losses: Mapping[str, Tensor]
    squares: Mapping[str, list[float]]
    seconds: Mapping[str, float]

    def curve(self, way: str) -> Curve:
        return Curve(tuple(bits * self.weights for bits in BITS), tuple(self.losses[way].tolist()))


def compared(arguments: argparse.Namespace) -> list[Found]:
    """Every linear of the blocks. Raises LqerError for a model or a text that cannot be read."""
    device, source = pick_device(arguments.device), resolve_model(arguments.model)
    rows = load_rows(DatasetSpec(path=str(arguments.text)), "calibration")
    samples = arguments.num_samples
    windows_WT = calibration_windows(load_tokenizer(source), rows, samples + arguments.windows, arguments.seq_len)
    opened = OpenedModel.resident(load_model(source, torch.float32, torch.device("cpu")), device, Offload())
    text, found = CalibrationText(windows_WT[:samples], BATCH_SIZE, ERROR_TOKENS), []
    with tempfile.TemporaryDirectory() as folder:
        calibration = Store(Path(folder)).obtain(
            "calibrate", 0, lambda workspace: calibrate(workspace, opened, text, {Hessian()})
        )
        for run in walk_backward(opened, windows_WT[samples:], BATCH_SIZE, SEED):
            if run.index in arguments.blocks:
                found += list(_of_block(run, calibration, arguments))
            else:
                run.backward({})
    return sorted(found, key=lambda one: one.block)


def _of_block(run: BackwardRun, calibration: Artifact, arguments: argparse.Namespace) -> Iterator[Found]:
    plan = LinearPlan(RoundingOnly(), Trellis(2, arguments.state_bits), rounding=Ldlq(), transform=Hadamard())
    linears = {f"{run.run.name}.{name}": linear for name, linear in block_linears(run.run.block).items()}
    found, visits = [], {}
    for name, site in BlockStatistics.read(calibration, run.index).by_site(linears, run.run.device):
        weight_OI = linears[name].weight.detach().to(run.run.device, torch.float32)
        sampled = Sampled.of(name, plan, plan.method.target(weight_OI, site, plan), arguments.rows)
        errors, seconds = _errors(sampled, arguments.state_bits)
        squares = {way: [error_SI.square().mean().item() for error_SI in errors[way]] for way in WAYS}
        losses = {way: torch.zeros(len(BITS), dtype=torch.float64, device=weight_OI.device) for way in WAYS}
        scale = len(weight_OI) / len(sampled.rows_S) / (arguments.windows * arguments.seq_len)
        visits[name.removeprefix(f"{run.run.name}.")] = partial(_add, losses, errors, sampled, scale)
        found.append(Found(name, run.index, weight_OI.numel(), losses, squares, seconds))
        print(f"{name}: searched in {seconds['searched']:.1f} s, drawn in {seconds['drawn']:.1f} s", file=sys.stderr)
    run.backward(visits)
    yield from found


def _errors(sampled: Sampled, state_bits: int) -> tuple[dict[str, list[Tensor]], dict[str, float]]:
    """Errors (S, I) by width, and seconds, by way. What is rotated already has no law for a plan without a rotation."""
    plans = {"searched": replace(sampled.plan, transform=None), "drawn": sampled.plan}
    errors, seconds = {}, {}
    for way, plan in plans.items():
        started = time.perf_counter()
        (errors[way],) = errors_of([replace(sampled, plan=plan)], [Trellis(bits, state_bits) for bits in BITS])
        # Waits for the device.
        errors[way][-1].sum().item()
        seconds[way] = time.perf_counter() - started
    return errors, seconds


def _add(
    losses: Mapping[str, Tensor],
    errors: Mapping[str, list[Tensor]],
    sampled: Sampled,
    scale: float,
    x_BNI: Tensor,
    g_BNO: Tensor,
) -> None:
    rotation = sampled.target.rotation
    assert rotation is not None, "the plan has one"
    x_BNI, g_BNO = rotation.input(x_BNI.float()), rotation.output_gradient(g_BNO.float())
    for way, losses_F in losses.items():
        losses_F += scale * added_losses(x_BNI, g_BNO[..., sampled.rows_S], errors[way])


def by_bits(found: Sequence[Found]) -> Iterator[str]:
    yield "| bits | median | least | most | sum of all |\n|---|---|---|---|---|"
    losses = {way: torch.stack([one.losses[way].cpu() for one in found]) for way in WAYS}
    for i, bits in enumerate(BITS):
        ratios = (losses["drawn"][:, i] / losses["searched"][:, i]).tolist()
        whole = float(losses["drawn"][:, i].sum() / losses["searched"][:, i].sum())
        cells = (statistics.median(ratios), min(ratios), max(ratios), whole)
        yield f"| {bits} | {' | '.join(f'{cell:.2f}' for cell in cells)} |"


def by_block(found: Sequence[Found]) -> Iterator[str]:
    yield "| block | mean square of E, least | most |\n|---|---|---|"
    for block in sorted({one.block for one in found}):
        ratios = [
            drawn / searched
            for one in found if one.block == block
            for searched, drawn in zip(*(one.squares[way] for way in WAYS), strict=True)
        ]  # fmt: skip
        yield f"| {block} | {min(ratios):.3f} | {max(ratios):.3f} |"


def by_budget(found: Sequence[Found]) -> Iterator[str]:
    yield "| bits of a weight | linears of another width | searched Δ over that by the search |\n|---|---|---|"
    curves = {way: {one.name: one.curve(way) for one in found} for way in WAYS}
    weights = sum(one.weights for one in found)
    for budget in BUDGETS:
        chosen = {way: allocate_widths(curves[way], int(budget * weights)).chosen for way in WAYS}
        others = sum(chosen["drawn"][one.name] != chosen["searched"][one.name] for one in found)
        best, ours = (sum(curves["searched"][name].losses[i] for name, i in chosen[way].items()) for way in WAYS)
        yield f"| {budget:g} | {others} of {len(found)} | {ours / best:.4f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, default=192, help="of every linear")
    parser.add_argument("--state-bits", type=int, default=12, help="L of the codes")
    parser.add_argument("--num-samples", type=int, default=16, help="windows of the statistics")
    parser.add_argument("--windows", type=int, default=4, help="windows of the gradients")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write every linear's numbers here")
    arguments = parser.parse_args()
    try:
        found = compared(arguments)
    except LqerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{device_name(pick_device(arguments.device))}, torch {torch.__version__}, {len(found)} linears")
    seconds = {way: sum(one.seconds[way] for one in found) for way in WAYS}
    print(f"searched in {seconds['searched']:.1f} s, drawn in {seconds['drawn']:.1f} s, codes measured within\n")
    print("\n\n".join("\n".join(table(found)) for table in (by_bits, by_block, by_budget)))
    if arguments.json:
        arguments.json.write_text(json.dumps([_plain(one) for one in found], indent=2) + "\n")
    return 0


def _plain(one: Found) -> dict[str, Any]:
    return {**vars(one), "losses": {way: losses_F.tolist() for way, losses_F in one.losses.items()}}


if __name__ == "__main__":
    sys.exit(main())
