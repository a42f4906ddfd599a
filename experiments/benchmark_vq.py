"""What vector quantization does to single linears: errors at equal bits, the published choices one by one, time.

    python experiments/benchmark_vq.py synthetic [--layers 3]
    python experiments/benchmark_vq.py model MODEL TEXT [--linears NAME ...] [--windows 32] [--seq-len 512]
    python experiments/benchmark_vq.py choices [MODEL TEXT [--linears NAME ...]]
    python experiments/benchmark_vq.py speed [--shape 4096 11008] [--bits 2] [--dimension 2] [--group-size 2048]

Errors are relative, tr(E H E^T) / tr(W H W^T) with H = E[x x^T] of the inputs. `synthetic` is a 256 x 512 layer of
student-t weights (5 degrees of freedom) with correlated inputs. MODEL is anything that a config's `model` may be, TEXT
anything that `calibration.dataset` may be. GPTQ is GPTVQ's own sweep over fixed uniform codebooks: groups of about 128
columns of a row, their grid fitted before the sweep.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from measures.errors import relative_error
from torch import Tensor, nn

from lqer.data.datasets import DatasetSpec, calibration_windows, load_rows
from lqer.errors import LqerError
from lqer.formats import Codebook, Int, QuantizedTensor
from lqer.formats.kmeans import DEFAULT_ITERATIONS, Seeds, fit_centroids
from lqer.models.source import load_model, load_tokenizer, pick_device, resolve_model
from lqer.report.environment import device_name
from lqer.rounding import Vector
from lqer.rounding.codebook_update import Update, update_codebooks
from lqer.rounding.hessian import DampedHessian
from lqer.rounding.vector import sweep_vectors

Layer = tuple[Tensor, Tensor]  # weight_OI, hessian_II
Method = Callable[[Tensor, Tensor], QuantizedTensor | tuple[Tensor, float]]

# Bits that GPTVQ's scripts name, and their weights per codebook for D = 1, 2, 4.
Dimension = Literal[1, 2, 4]
SETTINGS: dict[str, tuple[int, dict[Dimension, int]]] = {
    "2.125": (2, {1: 256, 2: 2048, 4: 65536}),
    "2.25": (2, {1: 128, 2: 1024, 4: 32768}),
    "3.125": (3, {1: 512, 2: 8192}),
}
UNIFORM_GROUP = 128


def synthetic_layer(seed: int, out_features: int = 256, in_features: int = 512, tokens: int = 4096) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    chi_square_OI = normal(5, out_features, in_features).square().mean(0)
    weight_OI = 0.02 * normal(out_features, in_features) / chi_square_OI.sqrt()
    mixing_II = torch.logspace(0, -1.5, in_features)[:, None] * normal(in_features, in_features) / in_features**0.5
    x_TI = normal(tokens, in_features) @ mixing_II + 0.1 * normal(tokens, in_features)
    x_TI *= (0.5 * normal(in_features)).exp()
    return weight_OI, x_TI.T @ x_TI / tokens


@torch.no_grad()
def model_layers(arguments: argparse.Namespace) -> dict[str, Layer]:
    """Weights of the named linears and the Hessians of their inputs in the original model."""
    source = resolve_model(arguments.model)
    model = load_model(source, torch.float32, torch.device("cpu"))
    text = load_rows(DatasetSpec(path=arguments.text), "calibration")
    windows_WT = calibration_windows(load_tokenizer(source), text, arguments.windows, arguments.seq_len)
    linears: dict[str, nn.Linear] = {name: model.get_submodule(name) for name in arguments.linears}  # type: ignore[misc]
    sums = {name: torch.zeros(linear.in_features, linear.in_features) for name, linear in linears.items()}

    def observe(name: str) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[Tensor]) -> None:
            x_TI = inputs[0].flatten(0, -2)
            sums[name].addmm_(x_TI.T, x_TI)

        return add

    hooks = [linear.register_forward_pre_hook(observe(name)) for name, linear in linears.items()]
    for window_1T in windows_WT.split(1):
        model.base_model(input_ids=window_1T, use_cache=False)
    for hook in hooks:
        hook.remove()
    tokens = windows_WT.numel()
    return {name: (linear.weight.detach(), sums[name] / tokens) for name, linear in linears.items()}


def gptq(bits: int) -> Method:
    """Error feedback on the grid of `Int`, written as a codebook of the grid's values."""

    def quantize(weight_OI: Tensor, hessian_II: Tensor) -> tuple[Tensor, float]:
        grid = Codebook(bits, 1, UNIFORM_GROUP, UNIFORM_GROUP)
        columns = grid.layout(*weight_OI.shape).group_columns
        uniform = Int(bits, columns, scale_dtype="bfloat16")
        parts = uniform.quantize(weight_OI).parts
        levels_K = torch.arange(grid.centroids, dtype=torch.int16)
        codes_GCK1 = (levels_K - parts["zeros"].unsqueeze(-1)).to(torch.int8).unsqueeze(-1)
        codebooks = {"codebooks": codes_GCK1, "codebook_scales": parts["scales"]}
        rounded = sweep_vectors(weight_OI, DampedHessian(hessian_II), grid, codebooks)
        return rounded.dequantize(), uniform.bits_per_value(weight_OI.shape[1])

    return quantize


def gptvq(
    number_format: Codebook, seeds: Seeds | None = None, iterations: int = DEFAULT_ITERATIONS, update: Update = "cg"
) -> Method:
    """Vector quantization with error feedback."""
    fit = partial(fit_centroids, centroids=number_format.centroids, seeds=seeds, iterations=iterations)

    def quantize(weight_OI: Tensor, hessian_II: Tensor) -> QuantizedTensor:
        swept = sweep_vectors(weight_OI, DampedHessian(hessian_II), number_format, fit)
        return update_codebooks(weight_OI, hessian_II, swept, update)

    return quantize


def methods(settings: str) -> dict[str, Method]:
    bits, group_sizes = SETTINGS[settings]
    rows: dict[str, Method] = {
        f"RTN int{bits} g128": lambda weight, hessian: Int(bits, UNIFORM_GROUP).quantize(weight),
        f"GPTQ int{bits} g128": gptq(bits),
    }
    for dimension, group_size in group_sizes.items():
        number_format = Codebook(bits, dimension, group_size)
        rows[f"k-means {dimension}D l={group_size}"] = lambda weight, hessian, f=number_format: f.quantize(weight)  # type: ignore[misc]
        rows[f"GPTVQ {dimension}D l={group_size}"] = gptvq(number_format)
    return rows


def choices() -> dict[str, Method]:
    """The sweep at 2 bits with one choice changed at a time."""
    rows: dict[str, Method] = {}
    for dimension, group_size in SETTINGS["2.125"][1].items():
        plain = Codebook(2, dimension, group_size)
        scaled = Codebook(2, dimension, 2 * group_size, scale_block_size=64)
        variants = {
            "default": gptvq(plain),
            "no update": gptvq(plain, update="none"),
            "adam": gptvq(plain, update="adam"),
            "mahalanobis seeds": gptvq(plain, seeds="mahalanobis"),
            "kmeans++ seeds": gptvq(plain, seeds="kmeans++"),
            "100 iterations": gptvq(plain, iterations=100),
            "block scales 64, l doubled": gptvq(scaled),
        }
        if dimension == 1:
            variants["rank 2, l halved"] = gptvq(Codebook(2, 1, group_size // 2, codebook_rank=2))
        rows |= {f"{dimension}D {label}": method for label, method in variants.items()}
    return rows


def print_table(layers: dict[str, Layer], rows: dict[str, Method]) -> None:
    print(f"| method | {' | '.join(layers)} | bits | CPU seconds |\n|---|{'---|' * (len(layers) + 2)}")
    for label, quantize in rows.items():
        errors, bits = [], []
        started = time.process_time()
        for layer in layers.values():
            result = quantize(*layer)
            if isinstance(result, QuantizedTensor):
                result = result.dequantize(), (result.code_bits + result.metadata_bits) / layer[0].numel()
            errors.append(relative_error(layer[0], result[0], layer[1]))
            bits.append(result[1])
        seconds = time.process_time() - started
        cells = " | ".join(f"{error:.4f}" for error in errors)
        print(f"| {label} | {cells} | {statistics.mean(bits):.3f} | {seconds:.1f} |", flush=True)


def time_one(arguments: argparse.Namespace) -> None:
    device = pick_device("auto")
    out_features, in_features = arguments.shape
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(out_features, in_features, generator=generator).to(device)
    x_TI = torch.randn(2 * in_features, in_features, generator=generator).to(device)
    x_TI[:, 1:] += 0.5 * x_TI[:, :-1]
    hessian_II = x_TI.T @ x_TI / len(x_TI)
    number_format = Codebook(arguments.bits, arguments.dimension, arguments.group_size)
    for _ in range(2):  # the first run loads libraries
        started = time.perf_counter()
        result = Vector().round(weight_OI, {"hessian": hessian_II}, number_format)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    error = relative_error(weight_OI, result.dequantize(), hessian_II)
    memory = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
    print(f"{out_features} x {in_features}, {number_format}: {seconds:.1f} s, error {error:.4f}{memory}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["synthetic", "model", "choices", "speed"])
    parser.add_argument("model", nargs="?")
    parser.add_argument("text", nargs="?")
    parser.add_argument("--layers", type=int, default=3, help="synthetic layers")
    parser.add_argument(
        "--linears", nargs="+", default=["model.layers.2.self_attn.q_proj", "model.layers.2.mlp.down_proj"]
    )
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 11008])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--dimension", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=2048)
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.text is None) or (arguments.mode == "model" and arguments.model is None):
        parser.error("MODEL and TEXT come together")
    print(f"{device_name(pick_device('auto'))}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    if arguments.mode == "speed":
        time_one(arguments)
        return 0
    try:
        layers = {f"seed {seed}": synthetic_layer(seed) for seed in range(arguments.layers)}
        if arguments.model:
            layers = model_layers(arguments)
    except LqerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.mode == "choices":
        print_table(layers, choices())
    else:
        for settings in SETTINGS:
            print(f"\n{settings} bits")
            print_table(layers, methods(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
