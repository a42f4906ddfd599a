"""The error at every linear's output under each reconstruction, on a real model.

    python experiments/compare_reconstructions.py MODEL --text FILE [--bits 3 2] [--rank 32] [--factor float32]
        [--methods lqer-svd ...] [--num-samples 32] [--seq-len 256] [--blocks N] [--json FILE]

MODEL is anything that a config's `model` may be. Calibrates once, then quantizes every linear of the decoder blocks to
MXINT in blocks of 16 by every method and prints, per bit width and method, the mean over linears of the relative error
tr(F R Fᵀ) / tr(W R Wᵀ) in float64, and in how many linears it is below that of qera-exact. `--factor x8` rounds A and B
to 8-bit MXINT as the presets do; with float32 factors no other reconstruction of the same W_q can be below.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from measures.errors import relative_error
from torch import Tensor

from lqer.data.datasets import DatasetSpec, calibration_windows, load_rows
from lqer.errors import LqerError
from lqer.formats import MXInt, NumberFormat, Passthrough
from lqer.methods import METHODS, LinearPlan
from lqer.models.loaders import OpenedModel
from lqer.models.source import load_model, load_tokenizer, pick_device, resolve_model
from lqer.models.structure import block_linears
from lqer.stages.calibrate import calibrate
from lqer.stages.gather import BlockStatistics, CalibrationText
from lqer.statistics import Hessian, MaxAbs
from lqer.store.offload import Offload
from lqer.store.store import Store

FACTORS: dict[str, NumberFormat] = {"float32": Passthrough("float32"), "x8": MXInt(bits=8)}
# Methods that are a rounding of their own reconstruct as qera-exact does.
RECONSTRUCTIONS = [name for name, method in METHODS.items() if method.rounding is None]
BATCH_SIZE, ERROR_TOKENS = 2, 1
# Float32 factors and a float32 R leave this much of a tie undecided.
TOLERANCE = 1e-6


def errors_by_linear(arguments: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Return {bits: {linear: {method: relative error}}}."""
    device = pick_device(arguments.device)
    source = resolve_model(arguments.model)
    rows = load_rows(DatasetSpec(path=str(arguments.text)), "calibration")
    windows_WT = calibration_windows(load_tokenizer(source), rows, arguments.num_samples, arguments.seq_len)
    opened = OpenedModel.resident(load_model(source, torch.float32, torch.device("cpu")), device, Offload())
    if arguments.blocks is not None:
        del opened.blocks[arguments.blocks :]
    text = CalibrationText(windows_WT, BATCH_SIZE, ERROR_TOKENS)
    errors: dict[str, dict[str, dict[str, float]]] = {str(bits): {} for bits in arguments.bits}
    with tempfile.TemporaryDirectory() as folder:
        calibration = Store(Path(folder)).obtain(
            "calibrate", 0, lambda workspace: calibrate(workspace, opened, text, {Hessian(), MaxAbs()})
        )
        for index, block in enumerate(opened.blocks):
            statistics = BlockStatistics.read(calibration, index)
            linears = {f"{opened.name}.{index}.{name}": linear for name, linear in block_linears(block).items()}
            for full_name, site in statistics.by_site(linears, device):
                weight_OI, r_II = linears[full_name].weight.detach().to(device, torch.float32), site["hessian"].double()
                for bits in arguments.bits:
                    errors[str(bits)][full_name] = {
                        method: relative_error(weight_OI, _effective(weight_OI, site, method, bits, arguments), r_II)
                        for method in arguments.methods
                    }
    return errors


def _effective(
    weight_OI: Tensor, site: Mapping[str, Tensor], method: str, bits: int, arguments: argparse.Namespace
) -> Tensor:
    plan = LinearPlan(
        method=METHODS[method](),
        weight=MXInt(bits=bits, block_size=16),
        rank=arguments.rank if METHODS[method].reconstructs else 0,
        factor=FACTORS[arguments.factor],
        iterations=METHODS[method].iterations,
    )
    return plan.quantize(weight_OI, site).effective_weight()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 2])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--factor", choices=tuple(FACTORS), default="float32")
    parser.add_argument("--methods", nargs="+", choices=RECONSTRUCTIONS, default=RECONSTRUCTIONS)
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--blocks", type=int, help="only the first ones (default: all)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write every linear's errors here")
    arguments = parser.parse_args()
    if "qera-exact" not in arguments.methods:
        arguments.methods.append("qera-exact")
    try:
        errors = errors_by_linear(arguments)
    except LqerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("| bits | method | mean relative output error | linears below qera-exact |")
    print("|---|---|---|---|")
    for bits, linears in errors.items():
        for method in arguments.methods:
            mean = sum(found[method] for found in linears.values()) / len(linears)
            below = sum(found[method] < found["qera-exact"] * (1 - TOLERANCE) for found in linears.values())
            print(f"| {bits} | {method} | {mean:.5f} | {below} of {len(linears)} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(errors, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
