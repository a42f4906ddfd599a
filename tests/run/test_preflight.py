"""What is refused before any work, by a run and by --validate alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import byte_tokenizer
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from lqer.config import read_config
from lqer.errors import LqerError
from lqer.run import pipeline, preflight


def both(experiment, *overrides: str, match: str) -> None:
    """A run and --validate refuse it with the same words, and nothing is built."""
    config = read_config(experiment.config, "refused", overrides)
    for check in (pipeline.run, lambda config: preflight.describe(config, lambda line: None)):
        with pytest.raises(LqerError, match=match):
            check(config)
    assert not list((experiment.output / "store").glob("[!.]*"))
    assert not (experiment.output / "refused").exists()


@pytest.mark.parametrize(
    ("dataset", "match"),
    [
        ("missing.txt", "dataset file missing.txt does not exist"),
        ("wikitxt2", "did you mean 'wikitext2'"),
        ("{folder}/short.txt", "perplexity needs a text of at least one window"),
        ("{folder}/other.jsonl", "row 0: .*text"),
        ("{folder}/utf16.txt", "cannot be read: 'utf-8' codec"),
    ],
)
def test_an_evaluation_text_that_cannot_be_used_is_refused(experiment, tmp_path, dataset, match):
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "other.jsonl").write_text('{"body": "a"}')
    (tmp_path / "utf16.txt").write_bytes("text".encode("utf-16"))
    path = dataset.format(folder=tmp_path)
    both(
        experiment, f'--evaluation.perplexity.datasets=["pydoc", "{path}"]',
        match=rf"^evaluation\.perplexity\.datasets\[1\]: .*{match}",
    )  # fmt: skip


def test_a_calibration_text_that_is_missing_or_too_short_is_refused(experiment, tmp_path):
    both(experiment, "--calibration.dataset=none.txt", match=r"^calibration\.dataset: dataset file none\.txt does not")
    (tmp_path / "short.txt").write_text("short")
    short = f"--calibration.dataset={tmp_path}/short.txt"
    both(experiment, short, match=r"^calibration\.dataset: text short\.txt yields 0 windows of .*num_samples is ")


def test_a_window_too_short_to_predict_a_token_is_refused(experiment):
    both(experiment, "--evaluation.perplexity.seq_len=1", match="seq_len must be at least 2")


def test_a_text_for_fine_tuning_that_is_missing_is_refused(experiment):
    both(
        experiment, "--quantize.activation=none", "--quantize.attention=none",
        '--finetune={ parts = ["low_rank"], dataset = "missing.txt" }',
        match=r"^finetune\.dataset: dataset file missing\.txt does not exist",
    )  # fmt: skip


def test_tasks_whose_data_are_missing_are_refused(experiment, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs: {data_files: {validation: nowhere.jsonl}}\n"
        "validation_split: validation\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: ['a', 'b']\n"
        "doc_to_target: label\n"
    )
    settings = f'--evaluation.downstream={{ tasks = ["own"], include_path = "{tmp_path}" }}'
    both(experiment, settings, match="nowhere.jsonl")


def test_a_tracker_that_is_not_installed_is_refused(experiment, monkeypatch):
    monkeypatch.setattr("lqer.report.tracking.find_spec", lambda name: None)
    both(experiment, "--tracking.backend=wandb", match=r"tracking\.backend: 'wandb' is not installed")


def test_an_output_folder_that_cannot_be_written_to_is_refused(experiment):
    both(experiment, "--output_dir=/proc/lqer", match="output_dir: /proc cannot be written to")


class TestPositions:
    @pytest.fixture
    def gpt2(self, tmp_path):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=257, n_embd=32, n_layer=2, n_head=2, n_positions=48, bos_token_id=0, eos_token_id=0
        )
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
        byte_tokenizer().save_pretrained(tmp_path / "gpt2")
        return tmp_path / "gpt2"

    def test_windows_beyond_a_table_of_positions_are_refused(self, experiment, gpt2):
        # The experiment's windows have 64 tokens.
        both(
            experiment, f"--model={gpt2}", match=r"calibration\.seq_len 64 exceeds the 48 positions of GPT2LMHeadModel"
        )
        both(
            experiment, f"--model={gpt2}", "--calibration.seq_len=32",
            match=r"evaluation\.perplexity\.seq_len 64 exceeds the 48 positions",
        )  # fmt: skip

    def test_windows_beyond_rotary_positions_are_run_with_a_warning(self, experiment):
        lines: list[str] = []
        preflight.describe(read_config(experiment.config, "long", ["--calibration.seq_len=256"]), lines.append)
        assert any(
            line.startswith("warning: calibration.seq_len 256 exceeds the 128 positions of Llama") for line in lines
        )
        assert lines[-1] == "valid"


def with_fewer_ids(tiny_model: Path, folder: Path, ids: int) -> Path:
    """The tiny model with the first rows of its embedding and head alone."""
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": ids}))
    tensors = load_file(folder / "model.safetensors")
    cut = {name: tensor[:ids] for name, tensor in tensors.items() if "embed_tokens" in name or "lm_head" in name}
    save_file(tensors | cut, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused(experiment, tiny_model, tmp_path):
    model = with_fewer_ids(tiny_model, tmp_path / "small", 60)
    both(experiment, f"--model={model}", match=r"the tokenizer gives token id \d+, but the embedding has 60 rows")


def test_a_tokenizer_without_its_vocabulary_is_refused(experiment, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "bare")
    (tmp_path / "bare/tokenizer.json").unlink()
    both(experiment, f"--model={tmp_path / 'bare'}", match="tokenizer")


def test_every_evaluation_text_is_compared_with_the_embedding(experiment, tiny_model, tmp_path):
    ids = {name: byte_tokenizer()(text)["input_ids"] for name, text in (("plain", "a b"), ("odd", "a \u20ac"))}
    assert max(ids["odd"]) > max(ids["plain"]), "the other text has an id of its own"
    model = with_fewer_ids(tiny_model, tmp_path / "small", max(ids["plain"]) + 1)
    (tmp_path / "plain.txt").write_text("a b" * 400)
    (tmp_path / "odd.txt").write_text("a \u20ac" * 400)
    both(
        experiment, f"--model={model}", f"--calibration.dataset={tmp_path / 'plain.txt'}",
        f'--evaluation.perplexity.datasets=["{tmp_path}/odd.txt", "{tmp_path}/plain.txt"]',
        match=r"token id \d+, but the embedding has \d+ rows",
    )  # fmt: skip
