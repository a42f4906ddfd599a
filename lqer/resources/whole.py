"""Stages that hold whole models: rotating one, and training a quantized one against the original."""

from __future__ import annotations

import math

from lqer.resources.linears import ASSUMED_RANK, packed_bytes
from lqer.resources.walk import LIVE_ACTIVATIONS, Walk
from lqer.resources.workload import OUTPUT_DIR, Piece, Workload, input_sites, planned

# A fast transform reads and writes the matrix, in float64, for every factor of two.
TRANSFORM_BYTES = 16
# Of a matrix on its way through a transform: float64, the two halves and what is put together from them.
MATRIX_COPIES = 3
# Float32 values of a tensor in training: itself, its gradient, Adam's two moments, the best so far.
TRAINED_COPIES = 5
# Float32 logits of both models, their softmax and the gradient.
LOGIT_COPIES = 4


def rotation(work: Workload) -> tuple[list[Piece], list[Piece], list[Piece], float, float]:
    """Host, device, disk, FLOPs and bytes moved of rotating the model; it goes to a GPU only if that has room."""
    summary = work.summary
    inside = summary.parameters - summary.outside_parameters
    largest = max(rows * columns for rows, columns in summary.linears.values())
    host = [Piece("the whole model in float32", 4 * summary.parameters)]
    device = [Piece("a matrix in a transform", 8 * MATRIX_COPIES * largest, sure=False)]
    disk = [Piece("the rotated model", 4 * inside + work.stored * summary.outside_parameters, OUTPUT_DIR)]
    halvings = math.log2(summary.hidden_size)
    # Every matrix of a block meets the residual stream on one side, and its values or inner channels on the other.
    return host, device, disk, 2.0 * 2 * halvings * inside, 2.0 * TRANSFORM_BYTES * halvings * inside


def finetuning(work: Workload) -> tuple[list[Piece], list[Piece], list[Piece], float, float]:
    """The same of fine-tuning: the quantized model in emulation and the original on one device, both whole."""
    settings, summary = work.config.finetune, work.summary
    assert settings is not None
    tokens = settings.batch_size * settings.seq_len
    width = summary.hidden_size + max(input_sites(summary))
    kept = LIVE_ACTIVATIONS * summary.blocks * tokens * width * work.computed
    fewer = "a smaller finetune.batch_size"
    whole = work.computed * summary.parameters
    device = [
        Piece("the original and the quantized model", 2 * whole),
        Piece("what is trained", 4 * TRAINED_COPIES * trained_values(work)),
        Piece("activations kept for gradients", kept, fewer, sure=False),
        Piece("logits of both", 4 * LOGIT_COPIES * tokens * summary.vocabulary, fewer, sure=False),
    ]
    packed = sum(packed_bytes(work, name, plan) for name, plan in work.plans.items())
    disk = [Piece("the fine-tuned model", packed + work.stored * summary.outside_parameters, OUTPUT_DIR)]
    # Weights are frozen: back through them costs what going forward does.
    trained_on = settings.epochs * settings.num_samples * settings.seq_len
    held_out = (settings.epochs + 1) * settings.validation_samples * settings.seq_len
    original = int(settings.loss == "original")
    passed = (2 + original) * trained_on + (1 + original) * held_out
    walk = Walk(work, settings.num_samples, settings.seq_len, settings.batch_size)
    flops, moved = walk.cost(passed)
    return [], device, disk, flops + 2.0 * summary.vocabulary * summary.hidden_size * passed, moved


def trained_values(work: Workload) -> int:
    """How many values of signs and columns are trained."""
    settings = work.config.finetune
    assert settings is not None
    found = 0
    for _, rows, columns, plan in planned(work):
        rank = min(ASSUMED_RANK if plan.rank is None else plan.rank, rows, columns)
        found += (rows + columns) * ("rht_signs" in settings.parts and plan.transform is not None)
        found += (rows + columns) * min(rank, settings.columns) * ("low_rank" in settings.parts)
    return found
