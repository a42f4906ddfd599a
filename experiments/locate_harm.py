"""Where the harm of rounding to integers comes from: linears, single weights, tokens, and signs of errors.

    python experiments/locate_harm.py MODEL --calibration FILE[@ROWS] --texts [NAME=]FILE[@ROWS] ...
        [--parts PART ...] [--bits 3] [--group-size 64] [--scales minmax] [--trellis BITS] [--rotated]
        [--num-samples 32] [--unseen N] [--seq-len 512] [--max-windows 10] [--batch-size 4] [--seconds N]

Every linear of the decoder blocks is rounded by GPTQ. Perplexity (windows of the texts as in the protocol "concat") and
the mean divergence from the original are measured on every text. One table for each part:

    kinds      only one kind of linear rounded, or all but one; every linear once, on inputs of the original
    blocks     the same of single blocks
    estimates  of each kind, the divergence that gradients foretell (harm/estimates.py), and that measured
    supers     the weights of early linears (--writer) that add most to the residual stream, kept or taken away
    tokens     which tokens own the second moments of the inputs
    schemes    token weights, orders, targets and more, one at a time (harm/schemes.py): bits, seconds, divergence by
               position, and signs of errors (harm/signs.py)

--trellis rounds to codes of rotated weights instead (kinds, blocks, estimates). --rotated folds a rotation of the
residual stream into the model first (docs/methods/scalar.md). --seconds begins no row after so many.

Shapes: W windows, T tokens of a window.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from harm.estimates import STRETCHES, estimates
from harm.schemes import Scheme, quantize, schemes
from harm.signs import error_signs
from harm.subject import POSITIONS, Harm, Setting, Subject
from harm.super_weights import early, largest_state, rows, super_weights
from harm.tokens import Shares, token_shares
from tqdm import tqdm

from lqer.errors import ConfigError, LqerError
from lqer.formats import Int, Trellis
from lqer.transforms import Hadamard

SUPER_WEIGHTS = 8
Row = Sequence[str]


class Run:
    """A subject, its format and scales, and the time at which no more rows are begun."""

    def __init__(self, subject: Subject, arguments: argparse.Namespace):
        self.subject = subject
        self.number_format = Int(arguments.bits, arguments.group_size)
        self.scheme = Scheme(arguments.scales)
        if arguments.trellis is not None:
            self.scheme = replace(self.scheme, weight=Trellis(arguments.trellis), transform=Hadamard())
        self.writer: str = arguments.writer
        self.schemes: list[str] = arguments.schemes
        self.windows: int = arguments.windows
        self._end = time.monotonic() + arguments.seconds

    def in_time(self, items: Iterable) -> Iterator:
        """The items for as long as there is time."""
        for item in tqdm([*items], leave=False):
            if time.monotonic() > self._end:
                print("out of time: the rows behind this one are left out", file=sys.stderr)
                return
            yield item

    @property
    def headings(self) -> list[str]:
        return [heading for text in self.subject.rulers for heading in (text, f"KL {text}")]


def shown(harms: Sequence[Harm]) -> list[str]:
    return [cell for harm in harms for cell in (f"{harm.perplexity:#.4g}", f"{harm.kl:.4f}")]


def kinds(run: Run) -> None:
    """Groups of linears by the last part of their names."""
    groups = _groups(run, lambda name: name.split(".")[-2])
    headings = [f"{which}: {heading}" for which in ("only these", "all but these") for heading in run.headings]
    exact = [f"only these, first tokens exact: KL {text}" for text in run.subject.rulers]
    print_table(["linears", "share of weights", *headings, *exact], _alone_and_left_out(run, groups))


def blocks(run: Run) -> None:
    prefix = f"{run.subject.opened.name}."
    groups = _groups(run, lambda name: name.removeprefix(prefix).partition(".")[0])
    print_table(["block", "share of weights", *run.headings], _alone(run, groups))


def _groups(run: Run, key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in run.subject.weights():
        groups.setdefault(key(name), []).append(name)
    return groups


def _once(run: Run) -> dict[str, torch.Tensor]:
    return quantize(run.subject, replace(run.scheme, propagate=False), run.number_format).parameters


def _alone_and_left_out(run: Run, groups: dict[str, list[str]]) -> Iterator[Row]:
    weights = _once(run)
    for group, names in run.in_time({"all": [*weights], **groups}.items()):
        these = {name: weights[name] for name in names}
        others = {name: weight for name, weight in weights.items() if name not in these}
        cells = [*shown(run.subject.harms(these)), *shown(run.subject.harms(others))]
        exact = [f"{harm.kl:.4f}" for harm in run.subject.harms_but_for_first_tokens(these)]
        yield [group, _share(these, weights), *cells, *exact]


def _alone(run: Run, groups: dict[str, list[str]]) -> Iterator[Row]:
    weights = _once(run)
    for group, names in run.in_time(groups.items()):
        these = {name: weights[name] for name in names}
        yield [group, _share(these, weights), *shown(run.subject.harms(these))]


def compare_estimates(run: Run) -> None:
    weights, own = _once(run), run.subject.weights()
    errors = {name: own[name].float() - weight.float() for name, weight in weights.items()}
    started = time.monotonic()
    found = estimates(run.subject, errors, run.subject.text.windows_WT[: run.windows])
    headings = [f"estimate by {_stretch(one)}" for one in STRETCHES]
    if len(run.subject.unseen_WT):
        unseen = estimates(run.subject, errors, run.subject.unseen_WT)
        found = {name: [*values, *unseen[name]] for name, values in found.items()}
        headings += [f"by unseen windows, {_stretch(one)}" for one in STRETCHES]
    print(f"estimates: {time.monotonic() - started:.0f} s", file=sys.stderr)
    texts = [f"KL {text}" for text in run.subject.rulers]
    print_table(["linears", *headings, *texts], _estimated(run, weights, found))


def _stretch(tokens: int | None) -> str:
    return "a token" if tokens == 1 else "a window" if tokens is None else f"{tokens} tokens"


def _estimated(run: Run, weights: dict[str, torch.Tensor], found: dict[str, list[float]]) -> Iterator[Row]:
    for group, names in run.in_time(_groups(run, lambda name: name.split(".")[-2]).items()):
        sums = [f"{sum(values):.5f}" for values in zip(*(found[name] for name in names), strict=True)]
        harms = run.subject.harms({name: weights[name] for name in names})
        yield [group, *sums, *(f"{harm.kl:.5f}" for harm in harms)]


def _share(these: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> str:
    return f"{sum(weight.numel() for weight in these.values()) / sum(map(torch.numel, weights.values())):.3f}"


def supers(run: Run) -> None:
    names = early(run.subject, run.writer)
    if not names:
        raise ConfigError(f"--writer must name a linear of the first third of the blocks; found {run.writer!r}")
    chosen = super_weights(run.subject, names, SUPER_WEIGHTS)
    print_table(
        ["linear", "row", "column", "weight", "largest input", "product"],
        (
            [one.linear, str(one.row), str(one.column), f"{one.weight:.4f}", f"{one.largest:.4g}", f"{one.product:.4g}"]
            for one in chosen
        ),
    )
    found = rows(run.subject, run.writer, run.scheme, run.number_format, chosen)
    print_table(
        ["weights", "largest state", *run.headings],
        ([label, f"{largest:.4g}", *shown(harms)] for label, largest, harms in found),
    )


def tokens(run: Run) -> None:
    """Shares of inputs, mean over the blocks and in the block where the massive tokens' is largest."""
    by_kind: dict[str, dict[str, Shares]] = {}
    for name, shares in token_shares(run.subject).items():
        by_kind.setdefault(name.rpartition(".")[2], {})[name] = shares
    print_table(
        ["input of", "first tokens", "massive tokens", "per window", "first under W", "massive under W",
         "largest share of massive tokens"],
        (_of_kind(kind, found) for kind, found in by_kind.items()),
    )  # fmt: skip


def _of_kind(kind: str, found: dict[str, Shares]) -> Row:
    def mean(key: str) -> str:
        values = [value for one in found.values() if (value := getattr(one, key)) is not None]
        return f"{statistics.fmean(values):.3f}" if values else ""

    worst = max(found, key=lambda name: found[name].massive)
    keys = ("first", "massive", "massive_per_window", "weighted_first", "weighted_massive")
    return [kind, *map(mean, keys), f"{found[worst].massive:.3f} ({worst.removesuffix(f'.{kind}')})"]


def compare_schemes(run: Run) -> None:
    """Two tables of the same schemes, each of which is quantized once."""
    chosen = {
        name: scheme
        for name, scheme in schemes(run.scheme.scales).items()
        if any(fnmatchcase(name, pattern) for pattern in run.schemes)
    }
    positions = [f"KL {text}, {position}" for text in run.subject.rulers for position in POSITIONS]
    by_sign: list[Row] = []
    print_table(
        ["scheme", "bits", "seconds", "largest state", *run.headings, *positions],
        (_of_scheme(run, name, scheme, by_sign) for name, scheme in run.in_time(chosen.items())),
    )
    texts = ["calibration", *run.subject.rulers]
    of_first = [f"{sign}, {texts[1]}" for sign in ("own error", "shrink", "massive: cosine", "massive: end")]
    print_table(["scheme", *(f"{sign}, {text}" for sign in ("cosine", "end") for text in texts), *of_first], by_sign)


def _of_scheme(run: Run, name: str, scheme: Scheme, by_sign: list[Row]) -> Row:
    """The scheme's row of the first table; those of the second are added to `by_sign`."""
    subject, batch_size = run.subject, run.subject.text.batch_size
    found = quantize(subject, scheme, run.number_format)
    harms = subject.harms(found.parameters)
    # A few windows of the calibration text are enough for means over blocks and tokens.
    windows = [subject.text.windows_WT[:batch_size], *(torch.cat(ruler.windows) for ruler in subject.rulers.values())]
    signs = [error_signs(subject.opened, found.parameters, windows_WT, batch_size) for windows_WT in windows]
    rest, massive = signs[1]
    of_first = rest.own, rest.shrink, massive.cosine, massive.end
    by_sign.append([name, *map(_cell, [*(one.cosine for one, _ in signs), *(one.end for one, _ in signs), *of_first])])
    largest = largest_state(subject, found.parameters)
    facts = [name, f"{found.average_bits:.3f}", f"{found.seconds:.1f}", f"{largest:.4g}"]
    return [*facts, *shown(harms), *(f"{kl:.4f}" for harm in harms for kl in harm.by_position())]


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


PARTS: dict[str, Callable[[Run], None]] = {
    "kinds": kinds, "blocks": blocks, "estimates": compare_estimates, "supers": supers, "tokens": tokens,
    "schemes": compare_schemes,
}  # fmt: skip


def print_table(headings: Row, lines: Iterable[Row]) -> None:
    print("| " + " | ".join(headings) + " |")
    print("|" + "---|" * len(headings))
    for line in lines:
        print("|" + "".join(f" {cell} |" if cell else " |" for cell in line), flush=True)
    print(flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--scales", choices=("minmax", "search", "least-squares"), default="minmax")
    parser.add_argument("--trellis", type=int, metavar="BITS", help="codes of rotated weights instead of integers")
    parser.add_argument("--windows", type=int, default=8, help="of the calibration text, for gradients")
    parser.add_argument("--unseen", type=int, default=0, help="windows behind the calibration text, for gradients too")
    parser.add_argument("--rotated", action="store_true")
    parser.add_argument("--writer", default="*.down_proj", help="linears that may have super weights")
    parser.add_argument("--schemes", nargs="+", default=["*"], metavar="PATTERN", help="those of the part of that name")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-windows", type=int, default=10, help="of every text that the model is judged on")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keys = ("model", "calibration", "texts", "num_samples", "seq_len", "max_windows", "batch_size", "rotated", "unseen")
    setting = Setting(**{key: getattr(arguments, key) for key in (*keys, "device", "dtype")})
    try:
        run = Run(setting.open(), arguments)
        for part in arguments.parts:
            started = time.monotonic()
            PARTS[part](run)
            print(f"{part}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    except LqerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
