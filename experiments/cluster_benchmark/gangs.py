"""Gangs of several sizes on the same checkpoint: seconds by phase, equal files, and one that loses a process."""

from __future__ import annotations

import multiprocessing
import shutil
import threading
import time
from collections.abc import Sequence

import torch

from cluster_benchmark.setup import TAG, Setup, header, made_files, perplexity_of, row, shown_equal
from lqer.config import read_config
from lqer.errors import RunFailedError
from lqer.jobs.here import run_here
from lqer.phases import Recorder, recorded
from lqer.run.jobs import jobs_of
from lqer.run.preflight import CheckedRun, check_run
from lqer.stages.gang import expect_gang
from lqer.store.names import block_file

# Of the phases of lqer.phases, those that a gang shares out, adds or leaves to the first process.
SHOWN = ("read", "forward", "statistics", "round", "exchange", "errors and spectra", "pack", "write", "hash")
SECONDS_BETWEEN_LOOKS = 0.01


def time_gangs(setup: Setup, presets: Sequence[str], sizes: Sequence[int], kills: bool) -> None:
    header("checkpoint", "GPUs", "seconds", *SHOWN, "others", "files equal to one process's", "perplexity")
    for preset in presets:
        for processes in sizes:
            _time_gang(setup, preset, processes)
        if kills:
            _kill_one(setup, preset, max(sizes))


def _checked(setup: Setup, preset: str, processes: int) -> CheckedRun:
    output = [f"--output_dir={setup.output(preset, processes)}", "--evaluation.baselines=[]"]
    gang = [f"--cluster.gang={processes}"]
    config = read_config(setup.config(preset), TAG, [*setup.overrides, *output, *gang])
    if config.has_gang:
        # As a run does.
        expect_gang()
    return check_run(config, lambda line: None)


def _time_gang(setup: Setup, preset: str, processes: int) -> None:
    run = _checked(setup, preset, processes)
    shutil.rmtree(run.store.root, ignore_errors=True)
    jobs = jobs_of(run.experiment, run.context.summary.blocks)
    recorder = Recorder(torch.cuda.synchronize if run.context.device.type == "cuda" else lambda: None)
    started = time.perf_counter()
    with recorded(recorder):
        run_here([*jobs.preparing, *jobs.quantizing], run.store)
    seconds = time.perf_counter() - started
    run_here(jobs.measuring, run.store)
    others = seconds - sum(recorder.main[name] for name in SHOWN)
    phases = [f"{recorder.main[name]:.1f}" for name in SHOWN]
    equal = _shown_equal(setup, preset, processes)
    row(preset, processes, f"{seconds:.1f}", *phases, f"{others:.1f}", equal, f"{perplexity_of(run):.6f}")


def _shown_equal(setup: Setup, preset: str, processes: int) -> str:
    return shown_equal(*(made_files(setup.output(preset, one)) for one in (processes, 1)))


def _kill_one(setup: Setup, preset: str, processes: int) -> None:
    """Kill one of the processes that quantize once a block is stored; then give the same command again."""
    run = _checked(setup, preset, processes)
    jobs = jobs_of(run.experiment, run.context.summary.blocks)
    for artifact in run.store.root.glob("quantize-*"):
        shutil.rmtree(artifact)

    def kill() -> None:
        while not any(run.store.root.glob(f"quantize-*.partial/{block_file(0)}")):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        multiprocessing.active_children()[-1].kill()

    threading.Thread(target=kill, daemon=True).start()
    started = time.perf_counter()
    try:
        run_here(jobs.quantizing, run.store)
    except RunFailedError as error:
        print(f"\n{preset}, after {time.perf_counter() - started:.1f} s: error: {error}", flush=True)
    blocks = len(list(run.store.root.glob("quantize-*.partial/block-*.safetensors")))
    started = time.perf_counter()
    run_here(jobs.quantizing, run.store)
    equal = _shown_equal(setup, preset, processes)
    print(f"the same command, with {blocks} of {run.context.summary.blocks} blocks there: "
          f"{time.perf_counter() - started:.1f} s, {equal} files equal to one process's\n", flush=True)  # fmt: skip
