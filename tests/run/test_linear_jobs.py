"""Linears as jobs of their own: the checkpoint of one process, whoever does them in whatever order, and is killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import byte_tokenizer
from killing import KilledError, dying_workspace
from mixtures import random_mixture
from stored_files import stored

from lqer.config import read_config
from lqer.errors import StoreError
from lqer.jobs.graph import Job, Schedule
from lqer.jobs.here import run_here
from lqer.run.preflight import CheckedRun, check_run
from lqer.run.worker import Parts, all_jobs_of, units_of_blocks
from lqer.stages import quantize as quantize_module
from lqer.store import store
from lqer.store.keeper import Keeper
from lqer.store.remote import RemoteStore

TRELLIS = [
    "--formats.t={kind='trellis',bits=2}", "--quantize.method=none", "--quantize.transforms=['hadamard']",
    "--quantize.weight=t", "--quantize.rounding=ldlq", "--quantize.low_rank.rank=0", "--quantize.skip=['*.mlp.*']",
]  # fmt: skip
CALDERA = [
    "--formats.e={kind='e8p',bits=2}", "--quantize.method={kind='caldera',down_date=0.97}",
    "--quantize.transforms=['hadamard']", "--quantize.weight=e", "--quantize.rounding=ldlq",
    "--quantize.low_rank={rank=4,format='x8',iterations=2}", "--quantize.skip=['*.k_proj', '*.up_proj']",
]  # fmt: skip
# With how many linears of a block that are quantized.
SCHEMES = {
    "lqer-act": ([], 7),
    "qera-exact": (["--quantize.method=qera-exact"], 7),
    "trellis": (TRELLIS, 4),
    "caldera": (CALDERA, 5),
}
BY_LINEAR, BY_BLOCK = Parts(4, 1, 1, "linears"), Parts(4, 1, 1)


def checked(experiment, output: str, *overrides: str) -> CheckedRun:
    settings = [f"--output_dir={experiment.folder / output}", "--evaluation.baselines=[]", *overrides]
    return check_run(read_config(experiment.config, "run", settings), lambda line: None)


def alone(experiment, *overrides: str) -> dict[str, Any]:
    run = checked(experiment, "alone", *overrides)
    jobs = all_jobs_of(run, BY_BLOCK._replace(blocks=1))
    run_here([*jobs.preparing, *jobs.quantizing], run.store)
    return stored(experiment.folder / "alone")


def of_linears(jobs) -> list[Job]:
    return [job for job in jobs.quantizing if job.name.endswith("_proj") or "experts" in job.name]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_linears_in_any_order_make_the_checkpoint_of_one_process(experiment, scheme):
    overrides, of_block = SCHEMES[scheme]
    run = checked(experiment, "shared", *overrides)
    jobs = all_jobs_of(run, BY_LINEAR)
    linears = of_linears(jobs)
    assert len(linears) == 4 * of_block
    rest = [job for job in jobs.quantizing if job not in linears]
    run_here([*jobs.preparing, *linears[::-1], *rest[::-1]], run.store)
    assert stored(experiment.folder / "shared") == alone(experiment, *overrides)


def test_experts_of_a_layer_are_one_job_among_those_of_linears(experiment, tmp_path):
    model = tmp_path / "mixture"
    random_mixture("qwen3_moe", vocab_size=257).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    overrides = [f"--model={model}", "--quantize.low_rank.rank=4"]
    run = checked(experiment, "shared", *overrides)
    jobs = all_jobs_of(run, BY_LINEAR)
    of_first = [job.name.rpartition(" ")[2] for job in of_linears(jobs) if " 1/" in job.name]
    assert of_first == [*(f"self_attn.{name}_proj" for name in "qkvo"), "mlp.experts"]
    run_here([*jobs.preparing, *jobs.quantizing], run.store)
    assert stored(experiment.folder / "shared") == alone(experiment, *overrides)


def test_a_block_needs_its_linears_and_the_checkpoint_all_blocks(undisturbed):
    jobs = all_jobs_of(checked(undisturbed, "planned"), BY_LINEAR)
    linears = of_linears(jobs)
    *blocks, whole = [job for job in jobs.quantizing if job not in linears]
    for index, block in enumerate(blocks):
        of_block = [job.name for job in linears if f" {index + 1}/4 " in job.name]
        assert block.needs == (*of_block, jobs.preparing[0].name)
    assert set(whole.needs) >= {block.name for block in blocks}
    # The longest first; what is put together takes no time beside that.
    ready = Schedule(jobs, [jobs.preparing[0].name]).ready()
    assert ready[0].endswith(("gate_proj", "up_proj", "down_proj"))
    assert sum(job.seconds for job in jobs.quantizing) == pytest.approx(60 * 1.5)


def test_a_linear_takes_long_by_its_size_and_its_method(undisturbed):
    context = checked(undisturbed, "planned").context
    (largest,) = {max(block.values()) for block in units_of_blocks(context, float("inf"))}
    assert largest == 64 * 96
    # So many of them as a model of 6.5e9 weights has.
    linears = 6.5e9 / largest
    assert units_of_blocks(context, 0.49 * linears) == []
    assert len(units_of_blocks(context, 0.51 * linears)) == 4


@pytest.mark.parametrize(
    "overrides", [["--calibration.keep=false"], ["--quantize.method=gptq", "--quantize.low_rank.rank=0"]]
)
def test_linears_that_wait_for_others_or_for_a_walk_are_no_jobs(undisturbed, overrides):
    assert not of_linears(all_jobs_of(checked(undisturbed, "planned", *overrides), BY_LINEAR))


@pytest.mark.parametrize("at", ["linears-00001-mlp.up_proj.json", "block-00002.safetensors"])
def test_a_kill_costs_the_linear_in_hand(experiment, monkeypatch, at):
    run = checked(experiment, "shared")
    jobs = all_jobs_of(run, BY_LINEAR)
    run_here(jobs.preparing, run.store)
    with monkeypatch.context() as killed:
        killed.setattr(store, "Workspace", dying_workspace(at))
        with pytest.raises(KilledError):
            run_here(jobs.quantizing, run.store)
    partial = next(run.store.root.glob("quantize-*.partial"))
    there = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.json") if "journal" not in path.name}
    assert there
    seen: list[str] = []

    class Seeing(store.Workspace):
        def write(self, name, *rest):
            seen.append(name)
            super().write(name, *rest)

    monkeypatch.setattr(store, "Workspace", Seeing)
    run_here(jobs.quantizing, run.store)
    assert not {name for name in seen if name.startswith("linears")} & there.keys()
    assert stored(experiment.folder / "shared") == alone(experiment)


def test_the_checkpoint_may_end_before_the_linears_of_a_written_block_are_removed(experiment, monkeypatch):
    run = checked(experiment, "shared")
    jobs = all_jobs_of(run, BY_LINEAR)
    linears = of_linears(jobs)
    first, second, third, fourth, _ = [job for job in jobs.quantizing if job not in linears]
    run_here([*jobs.preparing, *linears, first, second], run.store)
    remove_linears = quantize_module.remove_linears

    def remove_late(*arguments) -> None:
        # Another worker finds all blocks.
        monkeypatch.undo()
        run_here([fourth], run.store)
        remove_linears(*arguments)

    monkeypatch.setattr(quantize_module, "remove_linears", remove_late)
    run_here([third], run.store)
    assert stored(experiment.folder / "shared") == alone(experiment)


@pytest.mark.parametrize("is_remote", [False, True])
def test_a_block_that_another_worker_has_written_meanwhile_is_not_missed(experiment, tmp_path, monkeypatch, is_remote):
    """As where two runs make one checkpoint: its linears are gone when this one comes to read them."""
    run = checked(experiment, "shared")
    jobs = all_jobs_of(run, BY_LINEAR)
    linears = of_linears(jobs)
    first, *others = [job for job in jobs.quantizing if job not in linears]
    run_here([*jobs.preparing, *linears], run.store)
    read_linears = quantize_module.read_linears

    def read_late(*arguments):
        monkeypatch.undo()
        run_here([first], run.store)
        return read_linears(*arguments)

    monkeypatch.setattr(quantize_module, "read_linears", read_late)
    run_here([first], RemoteStore(tmp_path / "own", Keeper(run.store.root)) if is_remote else run.store)
    run_here(others, run.store)
    assert stored(experiment.folder / "shared") == alone(experiment)


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_process_or_gang_takes_the_linears_that_a_cluster_has_left(experiment, monkeypatch, ranks):
    run = checked(experiment, "shared")
    jobs = all_jobs_of(run, BY_LINEAR)
    # A whole block, and a part of the next one.
    run_here([*jobs.preparing, *of_linears(jobs)[:10]], run.store)
    names = {path.name for path in next(run.store.root.glob("quantize-*.partial")).glob("linears-*")}
    assert len(names) == 20
    quantized: list[str] = []
    quantize_linears = quantize_module.quantize_linears

    def seen(work, linears, *rest):
        quantized.extend(f"{work.index} {name}" for name in linears)
        return quantize_linears(work, linears, *rest)

    monkeypatch.setattr(quantize_module, "quantize_linears", seen)
    replace(run.experiment.quantize, ranks=ranks).obtain(run.store)
    assert quantized[:4] == ["1 self_attn.o_proj", *(f"1 mlp.{name}_proj" for name in ("gate", "up", "down"))]
    assert len(quantized) == 28 - 10
    assert stored(experiment.folder / "shared") == alone(experiment)


def test_a_damaged_linear_is_refused_by_name(experiment):
    run = checked(experiment, "shared")
    jobs = all_jobs_of(run, BY_LINEAR)
    linears = of_linears(jobs)
    run_here([*jobs.preparing, *linears], run.store)
    damaged = next(run.store.root.glob("quantize-*.partial/linears-00002-mlp.up_proj.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match=r"linears-00002-mlp\.up_proj\.safetensors is damaged"):
        run_here([job for job in jobs.quantizing if job not in linears], run.store)
    assert Path(damaged).exists()
