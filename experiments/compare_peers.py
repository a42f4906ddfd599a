"""A published library's quantizer, measured by the protocol of the pipeline: rows to set beside those of results.json.

    python experiments/compare_peers.py MODEL --peer auto-round|gptq|awq|hqq --bits 3 --group-size 128
        --calibration FILE[@ROWS] --texts FILE[@ROWS] ... [--num-samples 128] [--seq-len 2048] [--iterations N]
        [--max-windows N] [--device auto] [--dtype auto] [--json FILE]

MODEL is anything that a config's `model` may be, a text anything that a dataset's `path` may be, with its `rows` behind
an @ (`c4.jsonl@:90%`). The peer calibrates on the very windows that the pipeline reads from that text (their hash is
printed, and is `calibration.fingerprint` in results.json), with its library's defaults otherwise. Its weights are
dequantized by its own code into the original model, in which perplexity (protocol concat, windows of --seq-len) and
divergence from the original are measured. Prints one line of JSON; --json appends it to a file.

`average_bits` counts dense codes of --bits, and scales and zero points as the library stores them. (At 3 bits
llm-compressor and hqq pack ten codes into 32 bits, so their files hold 0.2 bits more.) `seconds` is the library's
call: without reading the model, and with what it compiles.

None of the libraries is a requirement of this project, and their own differ: install one into an environment apart,

    pip install auto-round==0.16.1      or hqq==0.2.8.post1 (DISABLE_CUDA=1: without its extension)
    pip install llmcompressor==0.14.0.1 compressed-tensors==0.19.0     (GPTQ and AWQ; wants transformers <= 5.17)

Shapes: W windows, T tokens of a window, N groups of a weight.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from measures.texts import text_spec
from peer_methods import AUTO_ROUND_ITERATIONS, PEERS, PeerTask
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lqer.config.evaluation import DivergenceConfig
from lqer.data.datasets import DatasetSpec, calibration_windows, load_rows, tokens_sha256
from lqer.errors import ConfigError, LqerError, ModelError
from lqer.evaluation.divergence import divergence, original_distributions
from lqer.evaluation.perplexity import concat_perplexity, concat_windows
from lqer.models.source import load_model, load_tokenizer, pick_device, pick_dtype, resolve_model
from lqer.models.structure import block_linears, find_blocks
from lqer.report.environment import device_name, versions


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for settings that no peer can meet."""
    if arguments.iterations is not None and arguments.peer != "auto-round":
        raise ConfigError(f"--iterations is AutoRound's; the peer is {arguments.peer}")
    for name in ("group_size", "num_samples", "iterations"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1; it is {value}")


def quantized_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights (O, I) of the linears of the decoder blocks, by name."""
    blocks_name, blocks = find_blocks(model)
    return {f"{blocks_name}.{name}.weight": linear.weight for name, linear in block_linears(blocks).items()}


def check_groups(model: PreTrainedModel, group_size: int) -> None:
    """Raises ModelError unless groups divide every row: peers pad, refuse or wrap around where they do not."""
    for name, weight_OI in quantized_weights(model).items():
        if weight_OI.shape[1] % group_size:
            raise ModelError(
                f"--group-size must divide the columns of {name}, {weight_OI.shape[1]}; it is {group_size}"
            )


def check_levels(model: PreTrainedModel, bits: int, group_size: int) -> None:
    """Raises ModelError if a group has more values than codes: a weight that the peer passed over."""
    for name, weight_OI in quantized_weights(model).items():
        ordered_NG = weight_OI.detach().reshape(-1, group_size).sort(-1).values
        levels = 1 + int((ordered_NG.diff(dim=-1) != 0).sum(-1).max())
        if levels > 2**bits:
            raise ModelError(f"a group of {name} has {levels} values after quantization to {bits} bits")


def copy_into(plain: PreTrainedModel, quantized: PreTrainedModel) -> None:
    """Copy all parameters into a model without the hooks and wrappers that the peer left in its own."""
    for name, parameter in plain.named_parameters():
        owner, _, leaf = name.rpartition(".")
        parameter.data.copy_(getattr(quantized.get_submodule(owner), leaf).detach())


def quantize(task: PeerTask, peer: str) -> tuple[float, float]:
    """Run the peer on the model of the task, in place. Returns (average bits, seconds)."""
    started = time.perf_counter()
    average_bits = PEERS[peer].quantize(task)
    if task.device.type == "cuda":
        torch.cuda.synchronize()
    return average_bits, time.perf_counter() - started


class Reference:
    """One text's windows (W, T) with what the original model says of them: perplexity and distributions."""

    def __init__(self, original: PreTrainedModel, windows_WT: Tensor) -> None:
        self.windows_WT = windows_WT
        self.batches = windows_WT.split(1)
        self.perplexity = concat_perplexity(original, windows_WT, batch_size=1).perplexity
        self.distributions = list(original_distributions(original, self.batches, DivergenceConfig().top_k))

    def compare(self, model: PreTrainedModel) -> dict[str, float]:
        """The row of another model on this text; KL in nats per token."""
        result = concat_perplexity(model, self.windows_WT, batch_size=1)
        distance = divergence(model, self.distributions, self.batches, "concat")
        return {
            "perplexity": result.perplexity,
            "original": self.perplexity,
            "kl_mean": distance.kl_mean,
            "kl_p99": distance.kl_p99,
            "top1_agreement": distance.top1_agreement,
            "tokens": result.tokens,
            "windows": result.windows,
        }


def windows_of(tokenizer: PreTrainedTokenizerBase, spec: DatasetSpec, arguments: argparse.Namespace) -> Tensor:
    text = load_rows(spec, "evaluation")
    return concat_windows(tokenizer, text.rows, text.joiner, arguments.seq_len)[: arguments.max_windows]


def measure(arguments: argparse.Namespace) -> dict:
    """The line of JSON, as a dictionary."""
    check_arguments(arguments)
    calibration, specs = text_spec(arguments.calibration), [text_spec(text) for text in arguments.texts]
    peer_versions = PEERS[arguments.peer].require(arguments.peer)
    device = pick_device(arguments.device)
    source = resolve_model(arguments.model)
    tokenizer, dtype = load_tokenizer(source), pick_dtype(arguments.dtype, source, device)
    rows = load_rows(calibration, "calibration")
    windows_WT = calibration_windows(tokenizer, rows, arguments.num_samples, arguments.seq_len, "--num-samples")
    texts = {spec.label: windows_of(tokenizer, spec, arguments) for spec in specs}

    model = load_model(source, dtype, torch.device("cpu"))
    check_groups(model, arguments.group_size)
    iterations = arguments.iterations or AUTO_ROUND_ITERATIONS
    task = PeerTask(model, tokenizer, windows_WT, arguments.bits, arguments.group_size, iterations, device)
    average_bits, seconds = quantize(task, arguments.peer)

    plain = load_model(source, dtype, device)
    references = {label: Reference(plain, text_WT) for label, text_WT in texts.items()}
    copy_into(plain, model)
    check_levels(plain, arguments.bits, arguments.group_size)
    settings = {"bits": arguments.bits, "group_size": arguments.group_size, "symmetric": False}
    if arguments.peer == "auto-round":
        settings["iterations"] = iterations
    ours = {name: version for name, version in versions().items() if name in ("torch", "transformers", "git")}
    return {
        "peer": arguments.peer,
        "versions": {**peer_versions, **ours},
        "model": source.description,
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "settings": settings,
        "calibration": {
            "text": rows.source,
            "num_samples": arguments.num_samples,
            "seq_len": arguments.seq_len,
            "fingerprint": tokens_sha256(windows_WT),
        },
        "average_bits": round(average_bits, 4),
        "seconds": round(seconds, 1),
        "texts": {label: reference.compare(plain) for label, reference in references.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--peer", choices=tuple(PEERS), required=True)
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), required=True)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--iterations", type=int, help=f"of AutoRound (default: {AUTO_ROUND_ITERATIONS})")
    parser.add_argument("--max-windows", type=int, help="only the first of every text (default: all)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--json", type=Path, help="append the line to this file")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        # Two of the libraries log to standard output.
        with contextlib.redirect_stdout(sys.stderr):
            line = json.dumps(measure(arguments))
    except LqerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(line)
    if arguments.json:
        with arguments.json.open("a") as file:
            file.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
