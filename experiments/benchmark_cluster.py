"""What several GPUs of one machine give: equal files, seconds of every kind of work, a sweep beside its perfect time.

    python experiments/benchmark_cluster.py gangs [--presets gptq qera-exact ...] [--gpus 1 2 4] [--kill]
    python experiments/benchmark_cluster.py parts [--presets qera-exact] [--gpus 1 2 4] [--kill]
    python experiments/benchmark_cluster.py sweep [--gpus 2]
        [--shape llama-2-7b] [--blocks 4] [--model DIR] [--windows 64] [--folder DIR] [--section.key=value ...]

Writes a random bfloat16 checkpoint of a shape (those of experiments/benchmark_pipeline.py) and random texts, and prints
rows of Markdown as they are found. With --model, it takes that model, and the settings name the texts. Without
--folder, everything is written to a temporary folder, and removed at the end; with it, it stays there, and later calls
use the model and compare with what gangs of one process have made.

gangs: makes each preset's checkpoint by gangs of so many processes, each with an empty store: seconds of the phases of
the first process, how many of the stored files have the hashes of those that one process made, and perplexity on
--windows windows. "exchange" is also the time in which a process waits for the others; "others" is their start, and
what no phase covers. With --kill, one of the largest gang is killed once the first block is stored, and the same
command is given again.

parts: lets the workers of a Ray cluster on this machine, with a GPU each, quantize each preset's checkpoint and
evaluate it and the original in parts: seconds from the start of the first job to the end of the last, of each kind of
job the seconds of each worker, and how many parts began before the last statistics were there. Files are compared with
those of a gang of one process, else of one worker that takes blocks (--cluster.split=blocks). With --kill, a busy
worker is killed once something is quantized.

sweep: twelve runs by such a cluster. The perfect time is that of all jobs, shared out evenly over the workers.

Each job that a worker has ended is told on stderr, with the seconds since the call of the cluster; the blocks of gangs
are counted by a bar there.

Where there are fewer GPUs than --gpus says, processes or workers share cards. Without a GPU, a worker has one thread,
and each process of a gang as many as OMP_NUM_THREADS says: files of unequal numbers of threads may differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from pipeline_benchmark.checkpoint import SHAPES


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the settings for the pipeline."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", choices=("gangs", "parts", "sweep"))
    parser.add_argument("--presets", nargs="+", default=["qera-exact", "gptq"])
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2], help="processes of a gang, or workers")
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--windows", type=int, default=64, help="to evaluate on")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--folder", type=Path)
    options, rest = parser.parse_known_args(arguments)
    for argument in rest:
        if not argument.startswith("--") or "." not in argument.partition("=")[0] or "=" not in argument:
            parser.error(f"{argument}: neither an option nor of the form --section.key=value")
    return options, rest


def measure(folder: Path, options: argparse.Namespace, overrides: list[str]) -> None:
    # Not at the top: the processes of a gang import this file too, and would be timed with a second of imports that
    # those of a run do not have.
    from cluster_benchmark.gangs import time_gangs
    from cluster_benchmark.setup import Setup
    from cluster_benchmark.workers import time_parts, time_sweep

    shape = SHAPES[options.shape]
    given = None if options.model is None else options.model.absolute()
    setup = Setup(folder, replace(shape, blocks=options.blocks or shape.blocks), options.windows, overrides, given)
    setup.write()
    print(f"{setup.describe()}\n", flush=True)
    if options.what == "gangs":
        time_gangs(setup, options.presets, options.gpus, options.kill)
        return
    for workers in options.gpus:
        if options.what == "parts":
            time_parts(setup, options.presets, workers, options.kill)
        else:
            time_sweep(setup, workers)


def main(arguments: list[str]) -> int:
    options, overrides = parse(arguments)
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        measure(options.folder.absolute(), options, overrides)
        return 0
    with tempfile.TemporaryDirectory(dir=Path(), prefix="cluster-") as name:
        measure(Path(name).absolute(), options, overrides)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
