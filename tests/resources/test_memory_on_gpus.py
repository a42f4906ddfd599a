"""What of a run is estimated to lie on a GPU, and what in RAM beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from memory_needs import SEQ_LEN, WINDOWS, experiment, need, stages_of, workload
from mixtures import random_mixture
from transformers import LlamaConfig

from lqer.config.plan import plan_model
from lqer.models.source import ModelSource
from lqer.models.summary import summarize_model
from lqer.resources.memory import estimate
from lqer.resources.workload import StageMemory, Workload, total


def test_hidden_states_of_the_calibration_text_are_on_a_gpu_that_has_much_room_for_them(random_model, tmp_path):
    """All streams of them, and neither there nor in RAM twice."""
    model, what, originals = random_model("llama"), "hidden states", "hidden states of the original model"
    states = WINDOWS * SEQ_LEN * model.config.hidden_size * 4
    quantize = {"method": "none", "low_rank": {"rank": 0}, "propagate_error": True, "rounding": {"kind": "adaptive"}}
    config = experiment(quantize=quantize, formats={"w4": {"kind": "int", "bits": 4}})

    def held(near_bytes: int, on_gpu: bool = True) -> tuple[dict[str, int], dict[str, int]]:
        work = workload(model, tmp_path, config, on_gpu=on_gpu, near_bytes=near_bytes)
        stage = stages_of(work)["quantize"]
        return tuple(
            {n.what: n.bytes for n in needs if n.what in (what, originals)} for needs in (stage.ram, stage.device)
        )

    everything = {what: states, originals: states}
    assert held(32 * states) == ({}, everything)
    assert held(32 * states - 32) == (everything, {})
    assert held(0) == (everything, {})
    assert held(32 * states, on_gpu=False) == held(0, on_gpu=False)


def test_hidden_states_of_other_walks_are_in_ram(random_model, tmp_path):
    """Those of all blocks, from which gradients are taken, and of texts of any length."""
    evaluation = {"blockwise": True}
    stage = stages_of(
        workload(random_model("llama"), tmp_path, experiment(evaluation=evaluation), on_gpu=True, near_bytes=10**12)
    )
    assert need(stage["evaluate"].ram, "hidden states") > 0
    assert need(stage["calibrate"].device, "hidden states") > 0


SHAPES = {
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("method", "rank"), [("gptq", 0), ("qera-exact", 32), ("gptq", 32)])
def test_the_blocks_of_the_largest_models_fit_a_gpu_of_80_gb(tmp_path, shape, method, rank):
    model = LlamaConfig(
        num_hidden_layers=2, num_key_value_heads=8, vocab_size=128256, dtype="bfloat16", **SHAPES[shape]
    )
    model.architectures = ["LlamaForCausalLM"]
    model.save_pretrained(tmp_path)
    summary = summarize_model(ModelSource("model", str(tmp_path), None, "", ""))
    config = experiment(
        quantize={"method": method, "weight": "int4", "low_rank": {"rank": rank}},
        formats={"int4": {"kind": "int", "bits": 4, "block_size": 128}},
        calibration={"seq_len": 2048, "num_samples": 128, "keep": False},
    )
    work = Workload(config, summary, plan_model(config, summary), stored=2, computed=2, on_gpu=True, streams=True)
    (stage,) = (stage for stage in estimate(work) if stage.name == "quantize")
    assert total(stage.device) < 80e9


def test_spectra_are_found_in_memory_of_a_gpu_alone_and_of_blocks_that_leave_room_for_them(random_model, tmp_path):
    model, what = random_model("llama"), "the matrix whose spectrum is found"
    on_gpu, on_cpu = (stages_of(workload(model, tmp_path, experiment(), on_gpu=found))["quantize"] for found in (1, 0))
    largest = model.config.hidden_size * model.config.intermediate_size
    assert need(on_gpu.device, what) == 3 * 8 * largest
    assert what not in [one.what for one in (*on_cpu.ram, *on_cpu.device)]


def mixture_quantized_on_a_gpu(tmp_path, propagate_error: bool = False, **changes) -> StageMemory:
    """GPTQ on a mixture of four experts."""
    random_mixture("mixtral").save_pretrained(tmp_path)
    summary = summarize_model(ModelSource("model", str(tmp_path), None, "", ""))
    quantize = {"method": "gptq", "weight": "w4", "low_rank": {"rank": 0}, "propagate_error": propagate_error}
    config = experiment(quantize=quantize, calibration={"keep": False})
    work = Workload(config, summary, plan_model(config, summary), stored=4, computed=4, on_gpu=True, streams=True)
    return stages_of(replace(work, **changes))["quantize"]


def test_experts_whose_sums_would_fill_a_gpu_hold_those_of_one_pass_there_and_their_statistics_in_ram(
    tmp_path, monkeypatch
):
    together = mixture_quantized_on_a_gpu(tmp_path)
    magnitudes = 3 * 8  # bytes of a channel, beside E[x xᵀ] in float64
    of_one = sum(8 * width**2 for width in (32, 48))
    assert need(together.device, "accumulators") > 4 * of_one
    monkeypatch.setattr("lqer.resources.statistics.PASS_BYTES", 2 * (of_one + (32 + 48) * magnitudes))
    apart = mixture_quantized_on_a_gpu(tmp_path)
    saved = need(together.device, "accumulators") - need(apart.device, "accumulators")
    assert 1.9 * of_one < saved < 2.1 * (of_one + (32 + 48) * magnitudes)
    assert need(apart.ram, "statistics of a block") == need(together.device, "statistics of a block")
    assert "statistics of a block" not in [one.what for one in apart.device]
    # Where each pass's statistics are used at once, no others wait.
    propagated = mixture_quantized_on_a_gpu(tmp_path, propagate_error=True)
    assert "statistics of a block" not in [one.what for one in (*propagated.ram, *propagated.device)]


def test_a_gpu_reads_blocks_ahead_as_they_are_stored(tmp_path):
    plain, coded = (mixture_quantized_on_a_gpu(tmp_path, read_block=size) for size in (None, 1000))
    assert need(coded.ram, "two blocks as read") == 2000
    assert need(plain.ram, "two blocks as read") == need(plain.device, "block") * 2
    assert need(coded.ram, "two blocks as read to be rounded") == 2000


def test_of_a_block_that_is_too_large_to_be_read_ahead_a_part_is_in_ram(tmp_path):
    small, large = (mixture_quantized_on_a_gpu(tmp_path, read_block=size) for size in (1 << 32, (1 << 32) + 1))
    assert need(small.ram, "two blocks as read") == 2 << 32
    assert need(large.ram, "part of a block as read") == need(large.ram, "part of a block as read to be rounded")
    assert total(small.ram) - total(large.ram) > 15e9
