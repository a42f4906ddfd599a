"""Export a model in every number format to every target that holds it, and compare each export with its checkpoint.

    python experiments/verify_exports.py MODEL TEXT [--targets KIND ...] [--widths BITS ...] [--formats PATTERN ...]

Weights are rounded to nearest in the formats of the table in docs/serving.md. TEXT is a file. Each line names a
target, a format and what the comparison found (lqer/export/verify.py): the largest difference of a logit on 4 windows,
and both perplexities on up to 20; "not verified" where the target's library is not installed; or why the target cannot
hold this model. Exit status 1 if an export differs from its checkpoint, which leaves no files.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import tomli_w

from lqer.config.reader import read_config
from lqer.errors import ExportError, LqerError
from lqer.export import Gptq, Target, export
from lqer.export.matrix import FAMILIES, SINGLE, WIDTHS
from lqer.export.run import refuse_unsupported
from lqer.export.source import Source
from lqer.formats import Int, NumberFormat
from lqer.run import pipeline


def formats_of_table(widths: list[int], patterns: list[str]) -> Iterator[tuple[str, NumberFormat]]:
    """The formats of the table whose names match a pattern, with these names; families in the given widths."""
    families = ((f"{label}, {bits} bits", family(bits)) for label, family in FAMILIES.items() for bits in widths)
    found = itertools.chain(families, SINGLE.items())
    return ((label, one) for label, one in found if any(fnmatchcase(label, pattern) for pattern in patterns))


def make_checkpoint(model: str, text: Path, number_format: NumberFormat, folder: Path, tag: str) -> Path:
    """The run's folder of the model with weights rounded to nearest. Raises LqerError as a run does."""
    described = {key: value for key, value in number_format.to_dict().items() if value is not None}
    settings = {
        "model": model,
        "output_dir": str(folder),
        "device": "cpu",
        "dtype": "float32",
        "formats": {"w": described},
        # For codebooks, and for the errors that every run reports.
        "calibration": {"dataset": str(text.resolve()), "num_samples": 4, "seq_len": 128},
        "quantize": {"method": "none", "weight": "w", "activation": "none"},
    }
    config = folder / f"{tag}.toml"
    config.write_text(tomli_w.dumps(settings), encoding="utf-8")
    pipeline.run(read_config(str(config), tag))
    return folder / tag


def target_for(kind: str, number_format: NumberFormat) -> Target:
    """The target with the settings that this format needs."""
    if kind == "gptq" and isinstance(number_format, Int) and not number_format.symmetric:
        return Gptq(version="2")
    return Target.registry[kind]()


def verified(run: Path, target: Target, out: Path, text: Path) -> str:
    """What the comparison found, or why there is none. Raises ExportError where the export differs."""
    try:
        refuse_unsupported(Source(run), target)
    except LqerError as error:
        return f"refused: {error}"
    found = export(run, target, out, text)
    if found is None:
        return "not verified"
    logits = f"logits differ by {found.logit_difference:.3g} of {found.largest_logit:.3g}"
    return f"{logits}, perplexity {found.exported_perplexity:.6g}, checkpoint {found.perplexity:.6g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--targets", nargs="+", choices=sorted(Target.registry), default=sorted(Target.registry))
    parser.add_argument("--widths", nargs="+", type=int, choices=list(WIDTHS), default=[*WIDTHS])
    parser.add_argument("--formats", nargs="+", default=["*"], help="patterns of names in the table, such as '*int*'")
    arguments = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number, (label, number_format) in enumerate(formats_of_table(arguments.widths, arguments.formats)):
            try:
                run = make_checkpoint(arguments.model, arguments.text, number_format, folder, f"run{number}")
            except LqerError as error:
                print(f"| – | {label} | no checkpoint: {error} |", flush=True)
                continue
            for kind in arguments.targets:
                target = target_for(kind, number_format)
                try:
                    found = verified(run, target, folder / f"{kind}-{number}", arguments.text)
                except ExportError as error:
                    wrong += 1
                    found = f"DIFFERS: {error}"
                print(f"| `{kind}` | {label} | {found} |", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
