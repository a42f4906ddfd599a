"""Every number format to every target: each line tells what the comparison found, or why there is none."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import verify_exports
from helpers import tiny_llama

MXINT4 = "`mxint`, blocks of 32, 4 bits"


@pytest.fixture
def found(letter_tokenizer, tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, dict[tuple[str, str], str]]]:
    """`found(*options)`: the exit status, and what the lines say by target and format."""
    tiny_llama().save_pretrained(tmp_path / "model")
    letter_tokenizer.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog " * 40)

    def call(*options: str) -> tuple[int, dict[tuple[str, str], str]]:
        monkeypatch.setattr(sys, "argv", ["verify_exports.py", str(tmp_path / "model"), str(text), *options])
        status = verify_exports.main()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
        return status, {(kind, label): told for kind, label, told in (line.strip("| ").split(" | ") for line in lines)}

    return call


def test_each_target_is_compared_refused_or_said_to_be_unverified(found):
    formats = ["*blocks of 16, 4 bits", "`codebook`"]
    status, lines = found("--targets", "dense", "gptq", "--widths", "4", "--formats", *formats)
    assert (status, len(lines)) == (0, 4)
    for label in ("`mxint`, blocks of 16, 4 bits", "`codebook`"):
        assert lines["`dense`", label].startswith("logits differ by 0 of ")
    assert lines["`gptq`", "`codebook`"].startswith("refused: gptq cannot hold model.layers.0.")


def test_gguf_gets_a_template_and_factors_go_where_they_can(found):
    options = ["--widths", "4", "--formats", MXINT4, "--targets", "gguf", "mlx"]
    status, lines = found(*options, "--rank", "4")
    assert status == 0
    assert lines["`gguf`", MXINT4].startswith("logits differ by ")
    assert lines["`mlx`", MXINT4].startswith("refused: mlx cannot hold ")
    assert found(*options)[1]["`gguf`", MXINT4].startswith("logits differ by 0 of ")


def test_a_difference_is_no_refusal(found, monkeypatch):
    monkeypatch.setattr("lqer.export.dense.effective_weight", lambda linear: linear.weight_OI.dequantize() * 1.01)
    status, lines = found("--targets", "dense", "--widths", "4", "--formats", MXINT4)
    assert status == 1
    assert lines["`dense`", MXINT4].startswith("DIFFERS: the files do not compute what the checkpoint does")
