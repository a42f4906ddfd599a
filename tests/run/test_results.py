"""The numbers of results.json belong to what they say, and are finite or null."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from lqer.config import read_config
from lqer.data.datasets import DatasetSpec
from lqer.errors import ModelError
from lqer.evaluation.perplexity import WINDOWED_PROTOCOLS
from lqer.report.assemble import distinct_labels
from lqer.run import pipeline


def test_two_texts_of_one_name_keep_their_own_numbers(experiment, tmp_path):
    for folder, words in (("a", "one two three four "), ("b", "zwei drei vier fuenf ")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.txt").write_text(words * 40)
    datasets = f'--evaluation.perplexity.datasets=["{tmp_path}/a/test.txt", "{tmp_path}/b/test.txt"]'
    first, second = pipeline.run(read_config(experiment.config, "two", [datasets]))["perplexity"]
    assert (first["dataset"], second["dataset"]) == ("a/test.txt:text", "b/test.txt:text")
    assert first["fingerprint"] != second["fingerprint"]
    assert first["quantized"] != second["quantized"]
    alone = pipeline.run(read_config(experiment.config, "alone", [datasets.replace(f'"{tmp_path}/a/test.txt", ', "")]))
    assert alone["perplexity"][0]["quantized"] == second["quantized"]


def test_two_columns_of_one_file_have_labels_of_their_own():
    specs = [DatasetSpec(path="d/a.jsonl", text_column=column) for column in ("question", "answer")]
    assert distinct_labels(specs) == ["d/a.jsonl:question", "d/a.jsonl:answer"]
    assert distinct_labels([*specs[:1], DatasetSpec(path="b.txt")]) == ["a.jsonl", "b.txt"]


def test_an_original_whose_loss_is_not_finite_is_refused(experiment, tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    # Large enough to overflow in the last layer and nowhere before.
    torch.nn.init.constant_(model.model.norm.weight, 1e38)
    model.save_pretrained(tmp_path / "broken")
    for file in tiny_model.glob("tokenizer*"):
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    config = read_config(experiment.config, "broken", [f"--model={tmp_path / 'broken'}"])
    with pytest.raises(ModelError, match="not finite"):
        pipeline.run(config)


def test_a_quantized_model_whose_loss_is_not_finite_is_null_with_a_warning(experiment, monkeypatch):
    protocol = WINDOWED_PROTOCOLS["concat"]

    def overflow(*arguments):
        return replace(protocol.result(*arguments), perplexity=float("inf"), nll=float("inf"))

    monkeypatch.setitem(WINDOWED_PROTOCOLS, "concat", protocol._replace(result=overflow))
    config = read_config(experiment.config, "overflow", ["--evaluation.baselines=[]"])
    results = pipeline.run(config)
    assert results["perplexity"][0]["quantized"] is None
    assert results["warnings"] == ["the perplexity of the quantized model on evaluation.txt is not finite"]
    folder = experiment.output / "overflow"

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    json.loads((folder / "results.json").read_text(), parse_constant=refuse)
    assert "**Warning**: the perplexity of the quantized model" in (folder / "report.md").read_text()
