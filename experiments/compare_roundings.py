"""What rounding to integers loses at every linear's output, on the calibration text and on other text.

    python experiments/compare_roundings.py MODEL --text FILE [--bits 3] [--group-size 128] [--num-samples 64]
        [--held-out 32] [--seq-len 2048] [--every 4] [--rows 256] [--inner "*.down_proj"] [--json FILE]

The residual stream of MODEL is rotated and folded; every linear of each `every`-th block is rounded by GPTQ with scales
of least squares (docs/methods/scalar.md) on E[x xᵀ] of the first windows. Printed is tr(F H Fᵀ) / tr(W H Wᵀ), relative
to GPTQ alone, mean over the linears of a kind, under H of the first windows and of the others:

    order      largest E[x²] first, scales fitted before
    descent    two turns of refitted scales and coordinate descent
    sort       sorted channels; balance: balanced columns; of linears that `inner` names alone
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch
from measures.errors import relative_error
from torch import Tensor

from lqer.data.datasets import DatasetSpec, calibration_windows, load_rows
from lqer.errors import LqerError
from lqer.formats import Int
from lqer.models.loaders import OpenedModel
from lqer.models.source import load_model, load_tokenizer, pick_device, resolve_model
from lqer.models.structure import block_linears
from lqer.rounding.gptq import gptq
from lqer.rounding.hessian import DampedHessian
from lqer.stages.calibrate import calibrate
from lqer.stages.gather import BlockStatistics, CalibrationText
from lqer.stages.rotate import rotate_in_place
from lqer.statistics import Hessian
from lqer.store.offload import Offload
from lqer.store.store import Artifact, Store
from lqer.transforms.balance import Balance, balanced_scale

BATCH_SIZE, ERROR_TOKENS, SEED, TURNS = 2, 1, 0, 2
Scheme = Callable[[Tensor, Tensor, Int], Tensor]  # a weight (O, I), E[x xᵀ] and a format to the rounded weight


def rounded(weight_OI: Tensor, hessian_II: Tensor, number_format: Int, descent: int = 0, order: bool = False) -> Tensor:
    """GPTQ with scales of least squares."""
    return gptq(
        weight_OI, DampedHessian(hessian_II), number_format, activation_order=order, scales="least-squares",
        descent=descent,
    ).dequantize()  # fmt: skip


def sorted_first(weight_OI: Tensor, hessian_II: Tensor, number_format: Int, descent: int = 0) -> Tensor:
    order_I = hessian_II.diagonal().argsort(descending=True, stable=True)
    found_OI = rounded(weight_OI[:, order_I], hessian_II[order_I][:, order_I].contiguous(), number_format, descent)
    return found_OI[:, order_I.argsort()]


def balanced_first(weight_OI: Tensor, hessian_II: Tensor, number_format: Int, descent: int = 0) -> Tensor:
    rows_I = torch.arange(weight_OI.shape[1], device=weight_OI.device)
    scale_I = balanced_scale([weight_OI], hessian_II, rows_I, Balance.strength, Balance.limit)
    scaled_II = hessian_II / scale_I / scale_I.unsqueeze(1)
    return rounded(weight_OI * scale_I, scaled_II, number_format, descent) / scale_I


ANY: dict[str, Scheme] = {
    "gptq": rounded,
    "order": partial(rounded, order=True),
    "descent": partial(rounded, descent=TURNS),
}
INNER: dict[str, Scheme] = {
    "sort": sorted_first,
    "balance": balanced_first,
    "sort, descent": partial(sorted_first, descent=TURNS),
    "balance, descent": partial(balanced_first, descent=TURNS),
}


def errors_by_linear(arguments: argparse.Namespace) -> dict[str, dict[str, tuple[float, float]]]:
    """By linear and scheme: the relative error under H of the calibration text and of the other text.

    "inputs" among the schemes holds the largest E[x²] over the median, of both.
    """
    device = pick_device(arguments.device)
    source = resolve_model(arguments.model)
    rows = load_rows(DatasetSpec(path=str(arguments.text)), "calibration")
    count = arguments.num_samples + arguments.held_out
    windows_WT = calibration_windows(load_tokenizer(source), rows, count, arguments.seq_len)
    model = load_model(source, torch.float32, torch.device("cpu"))
    rotate_in_place(model, device, SEED, online=False)
    opened = OpenedModel.resident(model, device, Offload())
    errors: dict[str, dict[str, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        calibrated, other = (
            _statistics(store, name, opened, part_WT)
            for name, part_WT in zip(
                ("calibrated", "other"), windows_WT.split([arguments.num_samples, arguments.held_out]), strict=True
            )
        )
        for index in range(0, len(opened.blocks), arguments.every):
            linears = {f"{opened.name}.{index}.{name}": x for name, x in block_linears(opened.blocks[index]).items()}
            sites = (BlockStatistics.read(one, index).by_site(linears, device) for one in (calibrated, other))
            for (name, of_calibration), (_, of_other) in zip(*sites, strict=True):
                weight_OI = linears[name].weight.detach().to(device, torch.float32)
                weight_OI = weight_OI[:: -(-len(weight_OI) // arguments.rows)]
                errors[name] = _errors(name, weight_OI, of_calibration, of_other, arguments)
    return errors


def _statistics(store: Store, name: str, opened: OpenedModel, windows_WT: Tensor) -> Artifact:
    text = CalibrationText(windows_WT, BATCH_SIZE, ERROR_TOKENS)
    return store.obtain(name, 0, lambda workspace: calibrate(workspace, opened, text, {Hessian()}))


def _errors(
    name: str,
    weight_OI: Tensor,
    of_calibration: Mapping[str, Tensor],
    of_other: Mapping[str, Tensor],
    arguments: argparse.Namespace,
) -> dict[str, tuple[float, float]]:
    hessians = [site["hessian"].double() for site in (of_calibration, of_other)]
    squares = [hessian_II.diagonal() for hessian_II in hessians]
    found = {"inputs": _of_both(squares, lambda square_I: float(square_I.max() / square_I.median()))}
    number_format = Int(arguments.bits, arguments.group_size)
    for scheme, of in {**ANY, **(INNER if fnmatch(name, arguments.inner) else {})}.items():
        effective_OI = of(weight_OI, hessians[0].float(), number_format)
        found[scheme] = _of_both(hessians, partial(relative_error, weight_OI, effective_OI))
    return found


def _of_both(tensors: list[Tensor], measure: Callable[[Tensor], float]) -> tuple[float, float]:
    calibrated, other = tensors
    return measure(calibrated), measure(other)


def print_table(errors: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    """A row for each kind of linear, and one for each linear that has a scheme of its own."""
    schemes = [*ANY, *INNER]
    print("| linear | largest over median E[x²] | gptq | " + " | ".join(schemes[1:]) + " |")
    print("|" + "---|" * (len(schemes) + 2))
    kinds: dict[str, list[str]] = {}
    for name, found in errors.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
        if INNER.keys() <= found.keys():
            kinds[name] = [name]
    for kind, names in sorted(kinds.items(), key=lambda item: (item[0] in errors, [*errors].index(item[1][0]))):
        cells = [f"{max(errors[name]['inputs'][0] for name in names):.0f}"]
        cells.append(_pair([statistics.fmean(errors[name]["gptq"][i] for name in names) for i in (0, 1)], 5))
        for scheme in schemes[1:]:
            ratios = [
                [errors[name][scheme][i] / errors[name]["gptq"][i] for name in names if scheme in errors[name]]
                for i in (0, 1)
            ]
            cells.append(_pair([statistics.fmean(of_text) for of_text in ratios], 3) if ratios[0] else "")
        print(f"| {kind} | " + " | ".join(cells) + " |")


def _pair(values: list[float], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--every", type=int, default=4, help="of the blocks, from the first on")
    parser.add_argument("--rows", type=int, default=256, help="at most, evenly spaced")
    parser.add_argument("--inner", default="*.down_proj", help="linears whose inputs can be sorted and scaled")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write every linear's errors here")
    arguments = parser.parse_args()
    try:
        errors = errors_by_linear(arguments)
    except LqerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(errors)
    if arguments.json:
        arguments.json.write_text(json.dumps(errors, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
