"""What lies on disk is hashed once: a model over all runs of a store, a checkpoint while it is read."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from lqer.config import read_config
from lqer.run import pipeline
from lqer.store import fingerprints, records
from lqer.store.fingerprints import FINGERPRINTS

LONG_AGO = 10**18


@pytest.fixture
def hashed(monkeypatch) -> dict[str, Counter[str]]:
    """How often each file was hashed, of models ("fingerprints") and to be verified ("records"), by its name."""
    counts: dict[str, Counter[str]] = {}
    for module in (fingerprints, records):
        count = counts[module.__name__.rpartition(".")[2]] = Counter()
        original = module.hash_file

        def noted(path: Path, count: Counter[str] = count, original=original) -> str:
            count[path.name] += 1
            return original(path)

        monkeypatch.setattr(module, "hash_file", noted)
    return counts


def run(experiment, *overrides: str) -> None:
    pipeline.run(read_config(experiment.config, None, ["--evaluation.baselines=[]", *overrides]))


def test_a_second_run_does_not_hash_the_model_again(experiment, tiny_model, hashed):
    for file in tiny_model.iterdir():
        os.utime(file, ns=(LONG_AGO, LONG_AGO))
    run(experiment)
    assert hashed["fingerprints"]["model.safetensors"] == 1
    assert (experiment.output / "store" / FINGERPRINTS).exists()
    run(experiment, "--quantize.low_rank.rank=4")
    assert {*hashed["fingerprints"].values()} == {1}


def test_a_check_alone_writes_nothing(experiment, tiny_model):
    os.utime(tiny_model / "model.safetensors", ns=(LONG_AGO, LONG_AGO))
    pipeline.check_run(read_config(experiment.config), print)
    assert not experiment.output.exists()


@pytest.mark.parametrize("blockwise", ["false", "true"])
def test_every_file_of_a_checkpoint_that_is_evaluated_is_verified_once(experiment, hashed, blockwise):
    """Also on two texts, for each of which `blockwise` reads every block again."""
    run(experiment)
    hashed["records"].clear()
    texts = [str(experiment.folder / f"{name}.txt") for name in ("evaluation", "calibration")]
    run(
        experiment, f"--evaluation.blockwise={blockwise}", f"--evaluation.perplexity.datasets={texts}",
        "--evaluation.perplexity.max_windows=3",
    )  # fmt: skip
    checkpoint = {path.name for path in (experiment.output / "tiny" / "checkpoint").iterdir()} - {"manifest.json"}
    shards = {name for name in checkpoint if name.endswith(".safetensors") and not name.startswith("spectra")}
    assert checkpoint <= hashed["records"].keys()
    assert {hashed["records"][name] for name in shards} == {1}


def test_a_checkpoint_that_is_only_kept_is_verified_too(experiment, hashed):
    run(experiment)
    hashed["records"].clear()
    run(experiment)
    assert hashed["records"]["block-00000.safetensors"] == 1
