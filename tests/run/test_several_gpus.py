"""Quantization, evaluation and fine-tuning over several GPUs, or shares of one, give what one process gives."""

from __future__ import annotations

import pytest
import torch
from stored_files import stored

from lqer.config import read_config
from lqer.run.cluster import fill_store
from lqer.run.pipeline import run

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("share", [0.5, pytest.param(1, marks=two_gpus)])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_parts_by_workers_with_a_gpu_or_a_share_of_one_store_the_bytes_of_one_process(experiment, share):
    pytest.importorskip("ray")
    overrides = [
        "--device=cuda", "--evaluation.backend=emulate", "--quantize.method=qera-exact", "--evaluation.baselines=[]"
    ]  # fmt: skip
    cluster = ["--cluster.address=local", f"--cluster.gpus_per_job={share}"]
    outputs = {name: f"--output_dir={experiment.folder / name}" for name in ("there", "here")}
    fill_store(read_config(experiment.config, "run", [*overrides, *cluster, outputs["there"]]))
    run(read_config(experiment.config, "run", [*overrides, outputs["here"]]))
    assert stored(experiment.folder / "there") == stored(experiment.folder / "here")


@two_gpus
@pytest.mark.parametrize(("dtype", "backend"), [("float32", "emulate"), ("bfloat16", "triton")])
def test_a_run_spread_over_all_gpus_ends_with_the_numbers_of_one(experiment, tmp_path, dtype, backend):
    # Attention operands stay as they are: kernels run linears.
    overrides = ["--device=cuda", f"--dtype={dtype}", f"--evaluation.backend={backend}", "--quantize.attention=none"]
    one, all_of_them = (
        run(read_config(str(experiment.config), device_map, [*overrides, f"--output_dir={tmp_path / device_map}",
                                                             f"--device_map={device_map}"]))
        for device_map in ("single", "auto")
    )  # fmt: skip
    assert one["perplexity"] == all_of_them["perplexity"]
    assert {"original", "rtn", "quantized"} <= set(one["perplexity"][0])


@two_gpus
def test_jobs_of_several_gpus_spread_the_model_and_end_with_the_numbers_of_one(experiment, tmp_path):
    """Parts of windows and requests, by a worker whose model is on two GPUs."""
    pytest.importorskip("ray")
    overrides = ["--device=cuda", "--evaluation.backend=emulate", *experiment.task()[1]]
    one = run(read_config(experiment.config, "one", [*overrides, f"--output_dir={tmp_path / 'one'}"]))
    settings = ["--device_map=auto", "--cluster.address=local", "--cluster.gpus_per_job=2"]
    config = read_config(experiment.config, "two", [*overrides, *settings, f"--output_dir={tmp_path / 'two'}"])
    fill_store(config)
    two = run(config.alone)
    for key in ("perplexity", "downstream"):
        assert one[key] == two[key]


@two_gpus
def test_fine_tuning_spread_over_all_gpus_learns_what_one_learns(experiment, tmp_path):
    overrides = [
        "--device=cuda", "--dtype=float32", "--evaluation.backend=emulate", "--quantize.attention=none",
        "--quantize.activation=none", "--quantize.transforms=['hadamard']", "--evaluation.baselines=[]",
        f"--finetune.dataset={experiment.folder / 'calibration.txt'}",
        "--finetune.parts=['rht_signs', 'low_rank']", "--finetune.num_samples=8", "--finetune.validation_samples=4",
        "--finetune.seq_len=32", "--finetune.epochs=2",
    ]  # fmt: skip
    one, all_of_them = (
        run(read_config(str(experiment.config), device_map, [*overrides, f"--output_dir={tmp_path / device_map}",
                                                             f"--device_map={device_map}"]))["finetune"]
        for device_map in ("single", "auto")
    )  # fmt: skip
    assert one["validation_loss"][-1] < one["validation_loss"][0]
    assert all_of_them["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-4)
