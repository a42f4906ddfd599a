"""Every number format to every target: each line tells what the comparison found, or why there is none."""

from __future__ import annotations

import sys

import verify_exports
from helpers import tiny_llama


def test_each_target_is_compared_refused_or_said_to_be_unverified(letter_tokenizer, tmp_path, monkeypatch, capsys):
    tiny_llama().save_pretrained(tmp_path / "model")
    letter_tokenizer.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog " * 40)
    formats = ["*blocks of 16, 4 bits", "`codebook`"]
    options = ["--targets", "dense", "gptq", "--widths", "4", "--formats", *formats]
    monkeypatch.setattr(sys, "argv", ["verify_exports.py", str(tmp_path / "model"), str(text), *options])
    assert verify_exports.main() == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    found = {(kind, label): told for kind, label, told in lines}
    assert len(found) == 4
    for label in ("`mxint`, blocks of 16, 4 bits", "`codebook`"):
        assert found["`dense`", label].startswith("logits differ by 0 of ")
    assert found["`gptq`", "`codebook`"].startswith("refused: gptq cannot hold model.layers.0.")
