"""The comparison with published libraries: its arguments, its checks, and each library where it is installed."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from importlib.util import find_spec

import compare_peers as comparison
import pytest
import torch
from helpers import byte_tokenizer, tiny_llama
from peer_methods import PEERS, Peer, PeerTask
from torch import nn

from lqer.errors import ConfigError, ModelError
from lqer.models.source import load_model, load_tokenizer, resolve_model
from lqer.models.structure import block_linears

CPU = torch.device("cpu")
ARGUMENTS = {"peer": "hqq", "group_size": 16, "num_samples": 2, "iterations": None}


def round_to_nearest(model: nn.Module, bits: int, group_size: int) -> None:
    for linear in block_linears(model.model.layers).values():
        groups_NG = linear.weight.data.reshape(-1, group_size)
        low_N1, high_N1 = groups_NG.amin(1, keepdim=True), groups_NG.amax(1, keepdim=True)
        step_N1 = (high_N1 - low_N1) / (2**bits - 1)
        rounded_NG = low_N1 + step_N1 * ((groups_NG - low_N1) / step_N1).round()
        linear.weight.data = rounded_NG.reshape(linear.weight.shape)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"iterations": 5}, "--iterations is AutoRound's; the peer is hqq"),
        ({"group_size": 0}, "--group-size must be at least 1; it is 0"),
        ({"num_samples": -1}, "--num-samples must be at least 1; it is -1"),
        ({"peer": "auto-round", "iterations": 0}, "--iterations must be at least 1; it is 0"),
    ],
)
def test_settings_that_no_peer_can_meet_are_refused(changed, said):
    with pytest.raises(ConfigError, match=said):
        comparison.check_arguments(Namespace(**{**ARGUMENTS, **changed}))


def test_a_library_that_is_not_installed_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(PEERS, "hqq", Peer("no_such_library", ("no-such-library==1.0",), PEERS["hqq"].quantize))
    command = [
        "compare_peers.py",
        "model",
        "--peer",
        "hqq",
        "--bits",
        "4",
        "--calibration",
        "a.txt",
        "--texts",
        "b.txt",
    ]
    monkeypatch.setattr(sys, "argv", command)
    assert comparison.main() == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "peer hqq cannot be imported" in said.err
    assert "pip install no-such-library==1.0" in said.err
    assert said.err.count("\n") == 1


def test_groups_must_divide_every_row():
    model = tiny_llama()
    comparison.check_groups(model, 16)
    with pytest.raises(ModelError, match=r"--group-size must divide the columns of model\.layers\.0\..*; it is 7"):
        comparison.check_groups(model, 7)


def test_a_weight_that_was_not_quantized_is_noticed():
    model = tiny_llama()
    with pytest.raises(ModelError, match="after quantization to 3 bits"):
        comparison.check_levels(model, 3, 16)
    round_to_nearest(model, 3, 16)
    comparison.check_levels(model, 3, 16)
    with pytest.raises(ModelError, match="after quantization to 2 bits"):
        comparison.check_levels(model, 2, 16)


def test_parameters_are_copied_into_a_plain_model():
    plain, quantized = tiny_llama(), tiny_llama(initializer_range=0.2)
    comparison.copy_into(plain, quantized)
    for (name, copied), (_, original) in zip(plain.named_parameters(), quantized.named_parameters(), strict=True):
        assert torch.equal(copied, original), name
        assert copied.data_ptr() != original.data_ptr()


def test_the_original_is_at_no_distance_from_itself_and_a_rounded_model_at_some():
    model = tiny_llama()
    windows_WT = torch.randint(model.config.vocab_size, (3, 16), generator=torch.Generator().manual_seed(0))
    reference = comparison.Reference(model, windows_WT)
    same = reference.compare(model)
    assert same["perplexity"] == same["original"]
    assert same["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert (same["windows"], same["tokens"]) == (3, 45)
    round_to_nearest(model, 2, 16)
    assert reference.compare(model)["kl_mean"] > 1e-4
    json.dumps(same, allow_nan=False)


@pytest.mark.parametrize("name", ["hqq", "gptq", "auto-round"])
def test_a_library_puts_every_linear_of_the_blocks_and_nothing_else_on_its_grid(name, tmp_path):
    """AWQ is left out: without a GPU its library fails, as it pins memory."""
    peer = PEERS[name]
    if find_spec(peer.module.partition(".")[0]) is None:
        pytest.skip(f"{peer.packages[0]} is not installed")
    # AutoRound passes over linears with less than 32 rows.
    tiny_llama(num_key_value_heads=4).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    source = resolve_model(str(tmp_path))
    quantized, plain = (load_model(source, torch.float32, CPU) for _ in range(2))
    windows_WT = torch.randint(1, quantized.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    task = PeerTask(quantized, load_tokenizer(source), windows_WT, 3, 16, 2, CPU)
    average_bits, _ = comparison.quantize(task, name)
    assert 3 + 16 / 16 < average_bits <= 3 + (32 + 3) / 16
    unquantized = {name: weight.clone() for name, weight in plain.named_parameters() if "proj" not in name}
    comparison.copy_into(plain, quantized)
    comparison.check_levels(plain, 3, 16)
    # AutoRound converts a float32 model to bfloat16.
    for name, weight in unquantized.items():
        torch.testing.assert_close(plain.get_parameter(name), weight, rtol=2**-8, atol=0)
