"""Parts of a checkpoint are made while statistics of later blocks are still gathered: by workers, and by chunks."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest
from clusters import config_of, needs_ray
from stored_files import stored

from lqer.run import pipeline
from lqer.run.cluster import fill_store

# In each process: the last block's statistics are not there before so many files of a checkpoint are. With `dies`, who
# gathers them is killed then, and so is who writes the second block, once each.
PLUGIN = """
import os
import signal
import time
from pathlib import Path

from lqer.stages import calibrate, quantize

FOLDER, FILES, DIES = Path({folder!r}), {files}, {dies}
observe_block, write_block = calibrate.observe_block, quantize.write_block


def die_once(at):
    try:
        (FOLDER / f"died at {{at}}").touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def observe(run, *rest):
    found = observe_block(run, *rest)
    if run.index == 3:
        end = time.monotonic() + 600
        while len(list(FOLDER.glob("there/store/quantize-*.partial/*.safetensors"))) < FILES:
            if time.monotonic() > end:
                raise TimeoutError("nothing was quantized meanwhile")
            time.sleep(0.05)
        if DIES:
            die_once("calibrate")
    return found


def write(workspace, work, found):
    if DIES and work.index == 1:
        die_once("quantize")
    return write_block(workspace, work, found)


calibrate.observe_block, quantize.write_block = observe, write
"""
OVERRIDES = ["--evaluation.baselines=[]"]


def plugin(folder: Path, files: int, dies: bool = False) -> str:
    path = folder / "held_back.py"
    path.write_text(PLUGIN.format(folder=str(folder), files=files, dies=dies))
    return str(path)


def assert_as_alone(experiment, *overrides: str) -> None:
    pipeline.run(config_of(experiment, "here", None, *OVERRIDES, *overrides))
    assert stored(experiment.folder / "there") == stored(experiment.folder / "here")


def calibrates(folder: Path) -> bool:
    """Whether statistics of the last block are missing."""
    return any(folder.glob("there/store/calibrate-*.partial")) and not any(
        folder.glob("there/store/calibrate-*/block-00003.safetensors")
    )


@needs_ray
@pytest.mark.parametrize(("split", "store"), [("blocks", "shared"), ("linears", "driver")])
def test_a_part_is_made_before_the_last_statistics_and_the_run_ends_with_the_bytes_of_one_process(
    experiment, address, caplog, split, store
):
    caplog.set_level("INFO", logger="lqer")
    # All that can be quantized by then.
    files = 3 if split == "blocks" else 3 * 7
    there = [f"--cluster.split={split}", f"--cluster.store={store}"]
    fill_store(config_of(experiment, "there", address, *there, *OVERRIDES), [plugin(experiment.folder, files)])
    done = re.findall(r"(calibrate|quantize)-\w+[^,:]*: done in", caplog.text)
    # A checkpoint's first part ended before the statistics did.
    assert done.index("quantize") < done.index("calibrate")
    assert_as_alone(experiment)


@needs_ray
def test_workers_killed_at_that_moment_cost_the_block_in_hand(experiment, address, caplog):
    caplog.set_level("INFO", logger="lqer")
    config = config_of(experiment, "there", address, *OVERRIDES)
    fill_store(config, [plugin(experiment.folder, files=1, dies=True)])
    for job in ("calibrate-\\w+", "quantize-\\w+ 2/4"):
        assert re.search(rf"{job}: its worker was lost; done again \(1 of 3\)", caplog.text), job
    assert_as_alone(experiment)


@needs_ray
def test_a_run_killed_at_that_moment_goes_on_with_what_both_have_stored(experiment, address, caplog):
    folder = experiment.folder
    command = experiment.command(
        "run", f"--output_dir={folder / 'there'}", f"--cluster.address={address}", "--device=cpu",
        "--cluster.cpus_per_job=1", "--plugin", plugin(folder, files=99), *OVERRIDES,
    )  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    blocks = "there/store/quantize-*.partial/block-*.safetensors"
    while len(list(folder.glob(blocks))) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert calibrates(folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob(blocks)}
    fill_store(config_of(experiment, "there", address, *OVERRIDES))
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("there/store/quantize-*/block-*.safetensors")}
    assert {name: after[name] for name in before} == before
    assert len(after) == 4
    assert_as_alone(experiment)


def test_a_chunk_is_made_while_another_process_gathers_statistics_of_later_blocks(experiment):
    """The one that gathers them waits for the blocks of the other, which is started later."""
    folder = experiment.folder
    held = plugin(folder, files=2)

    def start(chunk: str) -> subprocess.Popen:
        arguments = [f"--output_dir={folder / 'there'}", "--device=cpu", "--plugin", held, "--chunk", chunk, *OVERRIDES]
        command = experiment.command("run", *arguments)
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    last = start("2/2")
    while not any(folder.glob("there/store/calibrate-*.partial/block-00001.safetensors")):
        assert last.poll() is None
        time.sleep(0.02)
    first = start("1/2")
    said = first.communicate(timeout=600)[0]
    assert "chunk 1/2 finished; waiting for the remaining chunks" in said
    assert last.wait(600) == 0
    assert_as_alone(experiment)
