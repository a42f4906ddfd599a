"""Stages that several processes build together: the bytes of one process, whoever is killed."""

from __future__ import annotations

import logging
import multiprocessing
from typing import Any

import pytest
import torch
from helpers import byte_tokenizer
from mixtures import random_mixture
from stored_files import stored

from lqer.config import read_config
from lqer.config.cluster import ClusterConfig
from lqer.errors import ConfigError, ModelError, RunFailedError
from lqer.jobs.here import run_here
from lqer.run import pipeline
from lqer.run.chunks import Chunk
from lqer.run.jobs import jobs_of
from lqer.run.preflight import check_run
from lqer.stages import processes, reconstruct_block
from lqer.store import store
from lqer.store.workspace import Workspace

GPTQ = ["--quantize.method=gptq", "--quantize.low_rank.rank=0"]
LEARNED = [
    "--formats.i3={kind='int',bits=3,block_size=32}", "--quantize.weight=i3", "--quantize.method=none",
    "--quantize.low_rank.rank=0",
]  # fmt: skip
SCHEMES = {
    "qera-exact": ["--quantize.method=qera-exact"],
    "gptq": GPTQ,
    "gptq in turn": [*GPTQ, "--quantize.order=sequential"],
    "gptvq": [
        "--formats.v={kind='codebook',dimension=2,bits=2}", "--quantize.method=gptvq", "--quantize.weight=v",
        "--quantize.low_rank.rank=0",
    ],
    "ldlq": [
        "--quantize.method=lqer-act", "--quantize.rounding=ldlq", "--quantize.transforms=['hadamard']",
        "--quantize.propagate_error=true",
    ],
    # Micro-batches are what ranks share out.
    "awq, clip, adaptive": [
        *LEARNED, "--quantize.transforms=['awq','clip']",
        "--quantize.rounding={kind='adaptive',soft_fractions=[0.5,0.1],steps=3,micro_batch=1,both_targets=true}",
    ],
    "awq, lwc": [
        *LEARNED,
        "--quantize.transforms=['awq',{kind='lwc',epochs=1,batch_size=4,micro_batch=2,start='search'}]",
    ],
    "gptq of whole blocks": [*LEARNED, "--quantize.transforms=['gptq']"],
    "sort, balance": [*GPTQ, "--quantize.transforms=['sort','balance']"],
    "asymmetric": [*GPTQ, "--quantize.asymmetric=1.0", "--calibration.token_weights=residual"],
    "weighted by gradient": [
        *GPTQ, "--quantize.order=sequential", "--quantize.asymmetric=1.0", "--calibration.token_weights=gradient",
    ],
}  # fmt: skip


def make(experiment, output: str, ranks: int, *overrides: str) -> dict[str, Any]:
    """Make the checkpoint of a run. Returns what it stores."""
    folder = experiment.folder / output
    settings = [f"--output_dir={folder}", "--evaluation.baselines=[]", *overrides]
    gang = [f"--cluster.gang={ranks}"] if ranks > 1 else []
    checked = check_run(read_config(experiment.config, "run", [*settings, *gang]), lambda line: None)
    jobs = jobs_of(checked.experiment, checked.context.summary.blocks)
    run_here([*jobs.preparing, *jobs.quantizing], checked.store)
    return stored(folder)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ranks_make_the_checkpoint_of_one_process(experiment, caplog, scheme):
    caplog.set_level(logging.INFO, logger="lqer")
    # Batches of 2, 2, 2 and 1 window.
    settings = ["--calibration.num_samples=7", *SCHEMES[scheme]]
    alone = make(experiment, "alone", 1, *settings)
    assert "processes together" not in caplog.text
    for ranks in (2, 3):
        assert make(experiment, f"by-{ranks}", ranks, *settings) == alone
        assert f"quantize: {ranks} processes together" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("scheme", ["qera-exact", "gptq", "gptvq"])
def test_ranks_on_gpus_make_the_checkpoint_of_one_process(experiment, scheme):
    """Where there is one GPU, they share it."""
    settings = ["--calibration.num_samples=7", *SCHEMES[scheme], "--device=cuda"]
    assert make(experiment, "together", 2, *settings) == make(experiment, "alone", 1, *settings)


@pytest.mark.parametrize("method", ["lqer-act", "gptq"])
def test_ranks_observe_the_experts_of_one_process(experiment, tmp_path, method):
    model = tmp_path / "mixture"
    random_mixture("qwen3_moe", vocab_size=256).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    more = GPTQ if method == "gptq" else ["--quantize.low_rank.rank=4"]
    # More than some expert is sent.
    settings = [f"--model={model}", f"--quantize.method={method}", "--calibration.min_expert_tokens=300", *more]
    assert make(experiment, "together", 3, *settings) == make(experiment, "alone", 1, *settings)


@pytest.mark.parametrize(
    ("scheme", "stage", "last"),
    [
        ("qera-exact", "calibrate", "block-00001.safetensors"),
        ("gptq", "quantize", "block-00001.safetensors"),
        # Within the second block: both transforms and one of two rounds are done.
        ("awq, clip, adaptive", "quantize", "state-00001-02-0001.safetensors"),
    ],
)
def test_a_killed_rank_ends_the_gang_with_a_line_and_the_run_goes_on_from_there(
    experiment, monkeypatch, scheme, stage, last
):
    folder, settings = experiment.folder / "together", ["--calibration.num_samples=7", *SCHEMES[scheme]]

    class Killing(Workspace):
        def write_tensors(self, name, tensors):
            super().write_tensors(name, tensors)
            if name == last:
                multiprocessing.active_children()[-1].kill()

    monkeypatch.setattr(store, "Workspace", Killing)
    monkeypatch.setattr(reconstruct_block, "SECONDS_BETWEEN_STATES", 0)
    with pytest.raises(RunFailedError, match=rf"^{stage}: process 2 of 2 was killed by SIGKILL[^\n]*$"):
        make(experiment, "together", 2, *settings)
    monkeypatch.undo()
    assert not multiprocessing.active_children()
    assert len(list(folder.glob(f"store/{stage}-*.partial/{last}"))) == 1
    (block,) = folder.glob(f"store/{stage}-*.partial/block-00000.safetensors")
    written = block.stat().st_mtime_ns
    assert make(experiment, "together", 3, *settings) == make(experiment, "alone", 1, *settings)
    (block,) = folder.glob(f"store/{stage}-*/block-00000.safetensors")
    assert block.stat().st_mtime_ns == written


def test_a_run_by_ranks_reports_what_one_process_reports(experiment):
    """Neither results.json nor the configuration that a run leaves says how many processes made it."""
    results = [
        pipeline.run(read_config(experiment.config, "run", [f"--output_dir={experiment.folder / output}", *gang]))
        for output, gang in (("together", ["--cluster.gang=2"]), ("alone", []))
    ]
    for key in ("perplexity", "bits", "layers", "calibration"):
        assert results[0][key] == results[1][key]
    assert "cluster" not in results[0]["config"]
    assert "cluster" not in (experiment.folder / "together/run/config.toml").read_text()


@pytest.mark.parametrize(("ranks", "begun"), [(1, ["checks"]), (2, ["imports of the others", "checks"])])
def test_the_other_ranks_are_imported_while_a_run_is_checked(experiment, monkeypatch, ranks, begun):
    found: list[str] = []

    def check_run(*arguments):
        found.append("checks")
        raise ModelError("refused")

    monkeypatch.setattr(pipeline, "check_run", check_run)
    monkeypatch.setattr(processes.forkserver, "ensure_running", lambda: found.append("imports of the others"))
    with pytest.raises(ModelError, match="refused"):
        pipeline.run(read_config(experiment.config, "run", [f"--cluster.gang={ranks}"]))
    assert found == begun


def test_a_gang_works_on_no_chunk_and_chooses_its_gpus(experiment):
    config = read_config(experiment.config, "run", ["--cluster.gang=2"])
    with pytest.raises(ConfigError, match=r"--chunk 1/2: one process works on a chunk; found cluster\.gang 2"):
        pipeline.run_chunk(config, Chunk(1, 2))
    with pytest.raises(ConfigError, match=r"device: must name no GPU where cluster.gang is 2; found 'cuda:1'"):
        read_config(experiment.config, "run", ["--cluster.gang=2", "--device=cuda:1"])


def test_a_run_without_ray_keeps_its_gang_and_the_experiment_has_none(experiment):
    ray = "--cluster.address=local"
    config = read_config(experiment.config, "run", [ray, "--cluster.gang=2"])
    assert config.ray is not None
    assert config.alone.ray is None
    assert config.alone.cluster == ClusterConfig(gang=2)
    assert config.experiment.cluster is None
    assert read_config(experiment.config, "run", [ray]).alone.cluster is None
    assert read_config(experiment.config, "run", ["--cluster.gang=2"]).ray is None
    assert read_config(experiment.config, "run", ["--cluster.address=off"]).ray is None
    with pytest.raises(ConfigError, match=r'cluster\.gang: requires cluster\.store = "shared"; found 2'):
        read_config(experiment.config, "run", ["--cluster.gang=2", "--cluster.address=auto"])
