"""The texts of a run: a warning where the model is evaluated on what it learned from."""

from __future__ import annotations

from pydoc_data.topics import topics

import pytest
from helpers import byte_tokenizer

from lqer.cli import main
from lqer.config import read_config
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
