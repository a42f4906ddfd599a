"""results.json of runs that nobody ran, for the tables, figures and pages made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lqer.results import SCHEMA_VERSION, Results

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
FORMATS = {
    "w4": {"kind": "mxint"},
    "int3": {"kind": "int"},
    "e8p2": {"kind": "e8p"},
    "x8": {"kind": "mxint", "bits": 8, "block_size": 16, "scale_rounding": "ceil"},
}


def quantize_table(method: str = "lqer-act", weight: str = "w4", rank: int = 32, **more: Any) -> dict[str, Any]:
    """A resolved [quantize] table."""
    return {
        "method": {"kind": method}, "weight": weight, "activation": "x8", "low_rank": {"rank": rank},
        "transforms": [], "attention": "none", **more,
    }  # fmt: skip


def bits_table(average: float, low_rank: float = 0.0) -> dict[str, float]:
    """0.3 bits of scales, 0.15 of zero points and 0.05 of signs; the rest are codes."""
    return {
        "average": average, "weight": average - low_rank - 0.5, "low_rank": low_rank, "metadata": 0.5, "codebook": 0.0,
        "zeros": 0.15, "signs": 0.05,
    }  # fmt: skip


def text_row(dataset: str, quantized: float | None, plain: float | None = None) -> dict[str, Any]:
    return {
        "dataset": dataset, "source": dataset, "protocol": "concat", "seq_len": 2048, "tokens": 1000,
        "fingerprint": "0f" * 32, "original": 5.0, "rtn": plain, "quantized": quantized,
        "divergence": {
            "top_k": 256, "covered": 0.99, "rtn": None,
            "quantized": {"kl_mean": 0.125, "kl_p99": 0.5, "top1_agreement": 0.75},
        },
    }  # fmt: skip


def run_results(
    tag: str,
    bits: float,
    perplexities: dict[str, float | None],
    plain: float | None = None,
    quantize: dict[str, Any] | None = None,
    model: str = "some/model",
) -> Results:
    """A run with factors of half a bit, or none at a rank of 0. plain: the perplexity without them."""
    quantize = quantize or quantize_table()
    low_rank = 0.5 if quantize["low_rank"]["rank"] else 0.0
    found: Any = {
        "schema_version": SCHEMA_VERSION,
        "tag": tag,
        "warnings": [],
        "config": {
            "tag": tag, "output_dir": "checkpoints", "formats": FORMATS, "calibration": {"dataset": "c4"},
            "quantize": quantize,
        },
        "versions": {"python": "3.11", "lqer": "0.1.0", "triton": None},
        "model": {
            "name": model, "revision": None, "fingerprint": "ab", "architecture": "LlamaForCausalLM",
            "parameters": 1000, "quantized_parameters": 900, "description": model,
        },
        "bits": bits_table(bits, low_rank),
        "allocation": None,
        "baseline": {"bits": bits_table(bits - low_rank)},
        "finetune": {
            "parts": ["norms"], "tokens": 4096, "validation_loss": [2.0, 1.8, 1.9], "original_loss": 1.5,
            "best_epoch": 1,
        },
        "calibration": {"dataset": "c4", "source": "c4", "tokens": 4096, "fingerprint": "cd"},
        "perplexity": [text_row(dataset, value, plain) for dataset, value in perplexities.items()],
        "downstream": [],
        "exports": [],
        "tokens_per_second": {"original": 50.0, "quantized": 123.4},
        "layers": {"file": "layers.csv", "count": 24},
        "seconds": {"calibrate": 1.0, "quantize": 2.5, "finetune": 0.5, "evaluate": 3.0, "total": 7.0},
        "peak_memory_bytes": 2**30,
        "device": "a CPU",
    }  # fmt: skip
    return found


def layers_table(blocks: int = 4) -> pd.DataFrame:
    """layers.csv of a model of six kinds of linears; ranks and errors differ from block to block."""
    names = [f"model.layers.{block}.{kind}" for block in range(blocks) for kind in KINDS]
    place = np.arange(len(names))
    return pd.DataFrame(
        {
            "name": names, "rank": 16 * (place % 3), "bits": 4 + 0.25 * (place % 3),
            "weight_error": 0.1 / (1 + place), "output_error_before": 0.02 * (1 + place % 5),
            "output_error": 0.01 * (1 + place % 5),
        }
    )  # fmt: skip


def spectra(block: int = 2) -> dict[str, np.ndarray]:
    """Singular values of the linears of one block, by name and role."""
    names = [f"model.layers.{block}.{kind}" for kind in KINDS]
    return {f"{name}.{role}": 1 / np.arange(1, 33) for name in names for role in ("plain", "scaled", "weight")}
