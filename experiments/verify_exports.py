"""Export a model in every number format to every target that holds it, and compare each export with its checkpoint.

    python experiments/verify_exports.py MODEL TEXT [--targets KIND ...] [--widths BITS ...] [--formats PATTERN ...]
        [--rank R]

Weights are rounded to nearest in the formats of the table in docs/serving.md; with --rank the low-rank factors of LQER
(arXiv 2402.02446, without scales) stand beside them, which the target peft needs. TEXT is a file. Each line names a
target, a format and what the comparison found (lqer/export/verify.py): the largest difference of a logit on 4 windows,
and both perplexities on up to 20; "not verified" where the target's library is not installed; or why the target cannot
hold this model. Exit status 1 if an export differs from its checkpoint, which leaves no files.

A template of GGUF files is made here for models of architecture "llama", without a tokenizer, which the comparison does
not need.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import gguf
import tomli_w
from transformers import AutoConfig

from lqer.config.reader import read_config
from lqer.errors import DifferentExportError, LqerError
from lqer.export import Gguf, Gptq, Peft, Target, export
from lqer.export.matrix import FAMILIES, SINGLE, WIDTHS
from lqer.formats import Int, NormalFloat, NumberFormat
from lqer.run import pipeline


def formats_of_table(widths: list[int], patterns: list[str]) -> Iterator[tuple[str, NumberFormat]]:
    """The formats of the table whose names match a pattern, with these names; families in the given widths."""
    families = ((f"{label}, {bits} bits", family(bits)) for label, family in FAMILIES.items() for bits in widths)
    found = itertools.chain(families, SINGLE.items())
    return ((label, one) for label, one in found if any(fnmatchcase(label, pattern) for pattern in patterns))


def make_template(model: str, path: Path) -> Path | None:
    """A GGUF file of a model's hyperparameters alone; None for another architecture than "llama"."""
    config = AutoConfig.from_pretrained(model)
    if config.model_type != "llama":
        return None
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("no_vocab")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def make_checkpoint(model: str, text: Path, number_format: NumberFormat, rank: int, folder: Path, tag: str) -> Path:
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
        "quantize": {
            "method": "lqer-svd" if rank else "none",
            "weight": "w",
            "activation": "none",
            "low_rank": {"rank": rank},
        },
    }
    config = folder / f"{tag}.toml"
    config.write_text(tomli_w.dumps(settings), encoding="utf-8")
    pipeline.run(read_config(str(config), tag))
    return folder / tag


def target_for(kind: str, number_format: NumberFormat, template: Path | None) -> Target:
    """The target with the settings that this format needs."""
    if kind == "gptq" and isinstance(number_format, Int) and not number_format.symmetric:
        return Gptq(version="2")
    if kind == "peft" and isinstance(number_format, NormalFloat):
        return Peft(base="nf4")
    if kind == "gguf" and template is not None:
        return Gguf(template=str(template))
    return Target.registry[kind]()


def verified(run: Path, target: Target, out: Path, text: Path) -> str:
    """What the comparison found, or why there is none. Raises DifferentExportError where the export differs."""
    try:
        target.check_inputs()
        found = export(run, target, out, text)
    except DifferentExportError:
        raise
    except LqerError as error:
        return f"refused: {error}"
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
    parser.add_argument("--rank", type=int, default=0, help="of low-rank factors")
    arguments = parser.parse_args()
    model, text, wrong = arguments.model, arguments.text, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        template = make_template(model, folder / "template.gguf")
        for number, (label, number_format) in enumerate(formats_of_table(arguments.widths, arguments.formats)):
            try:
                run = make_checkpoint(model, text, number_format, arguments.rank, folder, f"run{number}")
            except LqerError as error:
                print(f"| – | {label} | no checkpoint: {error} |", flush=True)
                continue
            for kind in arguments.targets:
                target = target_for(kind, number_format, template)
                try:
                    found = verified(run, target, folder / f"{kind}-{number}", text)
                except DifferentExportError as error:
                    wrong += 1
                    found = f"DIFFERS: {error}"
                print(f"| `{kind}` | {label} | {found} |", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
