"""Adaptive rounding on a trained model, judged on text it has not seen. About half a minute on one core."""

from __future__ import annotations

import pytest
import torch
from helpers import first_block

from lqer.data.datasets import DatasetSpec, calibration_windows, load_rows
from lqer.formats import Int, MXInt
from lqer.models.source import load_model, load_tokenizer, resolve_model
from lqer.models.structure import block_linears
from lqer.rounding.adaptive import Adaptive, block_loss, round_block
from lqer.rounding.batches import Goal
from lqer.transforms.awq import scale_block

CALIBRATION, HELD_OUT, SEQ_LEN, BATCH = 16, 8, 128, 4


@pytest.fixture(scope="module")
def stories(assets):
    source = resolve_model(str(assets / "models/stories15M"))
    rows = load_rows(DatasetSpec(path=str(assets / "text/tinystories/tinystories.jsonl")), "calibration")
    windows_WT = calibration_windows(load_tokenizer(source), rows, CALIBRATION + HELD_OUT, SEQ_LEN)
    return load_model(source, torch.float32, torch.device("cpu")), windows_WT


@pytest.mark.parametrize(
    "number_format", [Int(bits=2, block_size=32), Int(bits=3, block_size="row"), MXInt(bits=3, block_size=32)], ids=str
)
def test_a_trained_block_ends_below_its_awq_start_on_held_out_text(stories, number_format):
    model, windows_WT = stories
    block, call, hidden = first_block(model, windows_WT)
    linears = block_linears(block)
    with torch.no_grad():
        targets = call({}, hidden)
    changed, _ = scale_block(
        call,
        [hidden[:CALIBRATION]],
        [hidden[:CALIBRATION]],
        dict.fromkeys(linears, number_format),
        ratios=(0.0, 0.25, 0.5),
    )
    norms = {name: tensor for name, tensor in changed.items() if name.endswith("norm.weight")}
    weights = {
        f"{name}.weight": changed.get(f"{name}.weight", linear.weight.detach()) for name, linear in linears.items()
    }
    starts = {name: number_format.quantize(weight) for name, weight in weights.items()}

    def scaled_block(linears, x):
        return call({**norms, **linears}, x)

    def held_out_loss(rounded):
        values = {name: tensor.dequantize() for name, tensor in rounded.items()}
        with torch.no_grad():
            return float(block_loss(scaled_block(values, hidden[CALIBRATION:]), targets[CALIBRATION:]))

    settings = Adaptive(steps=5, batch_size=BATCH, micro_batch=BATCH, learning_rate=2e-2)
    rounded = round_block(weights, starts, Goal(scaled_block, hidden[:CALIBRATION], [targets[:CALIBRATION]]), settings)
    assert held_out_loss(rounded) < 0.75 * held_out_loss(starts)
