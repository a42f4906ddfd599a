"""The texts of a run: a warning where the model is evaluated on what it learned from."""

from __future__ import annotations

from pydoc_data.topics import topics

import pytest
import torch
from helpers import byte_tokenizer

from lqer.cli import main
from lqer.config import read_config
from lqer.errors import DataError
from lqer.run import pipeline
from lqer.run.texts import read_texts


def overlaps(experiment, *overrides: str) -> tuple[str, ...]:
    return read_texts(read_config(experiment.config, None, overrides), byte_tokenizer()).overlaps


def test_two_texts_that_share_nothing_are_not_warned_of(experiment):
    assert overlaps(experiment) == ()


@pytest.mark.parametrize("protocol", ["concat", "lm-eval"])
def test_one_text_for_both_is_told_in_one_line(experiment, protocol):
    both = f"--evaluation.perplexity.datasets=['{experiment.folder / 'calibration.txt'}']"
    (found,) = overlaps(experiment, both, f"--evaluation.perplexity.protocol={protocol}")
    assert found == (
        "512 of the 512 calibration tokens are also in the evaluated text calibration.txt: its numbers flatter the "
        "quantized model (rows = ':50%' and '50%:' are two halves of one text)"
    )


def test_a_copy_under_another_name_is_found_too(experiment):
    (experiment.folder / "copy.txt").write_text(
        "An introduction. " + (experiment.folder / "calibration.txt").read_text()
    )
    (found,) = overlaps(experiment, f"--evaluation.perplexity.datasets=['{experiment.folder / 'copy.txt'}']")
    assert found.startswith("512 of the 512 calibration tokens are also in the evaluated text copy.txt")


def test_two_halves_of_one_text_do_not_overlap(experiment):
    path = experiment.folder / "both.txt"
    path.write_text("\n".join(topics[name] for name in sorted(topics))[:30_000])
    halves = [f"--calibration.dataset={{ path = '{path}', rows = ':50%' }}"]
    halves.append(f"--evaluation.perplexity.datasets=[{{ path = '{path}', rows = '50%:' }}]")
    assert overlaps(experiment, *halves) == ()


def test_the_text_of_fine_tuning_counts_as_well(experiment):
    learned = f"--finetune.dataset={experiment.folder / 'evaluation.txt'}"
    few = ["--finetune.num_samples=4", "--finetune.validation_samples=2", "--finetune.seq_len=64"]
    parts = ["--finetune.parts=['low_rank']", "--quantize.activation=none", "--quantize.attention=none"]
    (found,) = overlaps(experiment, learned, *few, *parts, "--quantize.low_rank.format=none")
    assert found.startswith("384 of the 384 fine-tuning tokens are also in the evaluated text evaluation.txt")


def test_the_warning_stands_before_the_work_and_in_the_results(experiment, capsys):
    both = f"--evaluation.perplexity.datasets=['{experiment.folder / 'calibration.txt'}']"
    few = ["--evaluation.baselines=[]", "--evaluation.perplexity.max_windows=8"]
    assert main(["--validate", str(experiment.config), both, *few], "") == 0
    assert "warning: 512 of the 512 calibration tokens are also in" in capsys.readouterr().out
    results = pipeline.run(read_config(experiment.config, None, [both, *few]))
    assert [warning.split(":")[0] for warning in results["warnings"]] == [
        "512 of the 512 calibration tokens are also in the evaluated text calibration.txt"
    ]


UNSEEN = [
    "--quantize.widths=['w4', 'x8']", "--quantize.budget_bits=7", "--quantize.widths_text=unseen",
    "--quantize.weight=w4", "--calibration.seq_len=32", "--calibration.num_samples=4",
]  # fmt: skip


def test_widths_are_measured_on_the_first_windows_of_the_calibration_text(experiment):
    found = read_texts(read_config(experiment.config, None, ["--calibration.num_samples=12"]), byte_tokenizer())
    assert len(found.calibration.windows_WT) == 12
    assert torch.equal(found.widths_WT, found.calibration.windows_WT[:8])


def test_widths_are_measured_on_the_windows_behind_the_calibration_text_where_asked(experiment):
    (experiment.folder / "long.txt").write_text(text := "".join(topics[name] for name in sorted(topics))[:600])
    dataset = f"--calibration.dataset={experiment.folder / 'long.txt'}"
    found = read_texts(read_config(experiment.config, None, [*UNSEEN, dataset]), byte_tokenizer())
    tokens_N = torch.tensor(byte_tokenizer()(text)["input_ids"][: 12 * 32])
    assert torch.equal(found.calibration.windows_WT.flatten(), tokens_N[: 4 * 32])
    assert torch.equal(found.widths_WT.flatten(), tokens_N[4 * 32 :])
    assert found.calibration_info["tokens"] == 4 * 32


def test_a_text_without_windows_behind_the_calibrated_ones_is_refused(experiment):
    (experiment.folder / "short.txt").write_text("".join(topics[name] for name in sorted(topics))[:256])
    dataset = f"--calibration.dataset={experiment.folder / 'short.txt'}"
    rule = r'calibration.num_samples \+ 8 \(quantize.widths_text = "unseen"\) is 12'
    with pytest.raises(DataError, match=rule):
        read_texts(read_config(experiment.config, None, [*UNSEEN, dataset]), byte_tokenizer())


def test_an_evaluated_text_that_widths_are_measured_on_is_warned_of(experiment):
    text = "".join(topics[name] for name in sorted(topics))
    (experiment.folder / "long.txt").write_text(text[:600])
    (experiment.folder / "behind.txt").write_text(text[4 * 32 + 64 : 1200])
    texts = [f"--calibration.dataset={experiment.folder / 'long.txt'}"]
    texts.append(f"--evaluation.perplexity.datasets=['{experiment.folder / 'behind.txt'}']")
    (found,) = overlaps(experiment, *UNSEEN, *texts)
    assert "of the 384 calibration tokens are also in the evaluated text behind.txt" in found
