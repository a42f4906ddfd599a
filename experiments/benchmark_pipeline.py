"""Where the time of whole runs goes: seconds of every phase, beside the floor of bytes and arithmetic.

    python experiments/benchmark_pipeline.py [--shape llama-2-7b] [--blocks N] [--presets lqer-act gptq ...]
        [--whole N] [--process recorded | unrecorded | this] [--folder DIR] [--model DIR] [--windows 20]
        [--device auto] [--section.key=value ...]

Writes a random bfloat16 checkpoint of a shape and random texts under --folder, then runs each preset on them in a fresh
process with an empty store, the model's files dropped from the system's cache before. Shapes: tiny, small, llama-2-7b,
llama-2-70b-block, llama-3.1-405b-block; --blocks changes the number of decoder blocks. --whole: a column for a model of
so many blocks, each phase as many times as long as its floor is; what a process compiles once is then counted as if
every block did, so that it is rather too long. Settings of the form
--section.key=value are those of experiments/pipeline.py and change every preset. The original is evaluated too, on
--windows windows like the quantized model.

Phases of the main thread add up to the wall clock; those of reading and writing threads run beside them. Recording
waits between phases for what the main thread has given the GPU, so a run that is not recorded is somewhat faster:
--process unrecorded measures the wall clock of one, as experiments/pipeline.py has it. --process this runs the presets
in this process one after another, which import nothing more and find the kernels that earlier ones have compiled.

Seconds of stages are those of the report; from block to block is the median of what lies between two blocks' files of
the checkpoint. Peak memory is what the process had allocated on a GPU at once, else its resident memory. Rates are
measured in the same call. Everything written is removed at the end, but for the checkpoint where --model says where it
is: a later call finds it there, and beside it the rates. Exit status 1 if a run failed.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path

import tomli_w
import torch
from pipeline_benchmark import child
from pipeline_benchmark import rates as machine
from pipeline_benchmark.checkpoint import SHAPES, Shape, word_tokenizer, write_model, write_text
from pipeline_benchmark.floors import Work, floors
from pipeline_benchmark.report import Measured, table

from lqer.config import Config, read_config
from lqer.config.plan import plan_model
from lqer.models.source import ModelSource, pick_device, pick_dtype
from lqer.models.summary import summarize_model
from lqer.report.environment import device_name
from lqer.results import RESULTS_FILE
from lqer.stages.measure_widths import WINDOWS
from lqer.stages.quantize_linears import requested_statistics
from lqer.statistics import Hessian
from lqer.store.names import BLOCK, CHECKPOINT_LINK

ROOT = Path(__file__).parents[1]


def main(arguments: list[str]) -> int:
    options, overrides = parse(arguments)
    shape = SHAPES[options.shape]
    shape = replace(shape, blocks=options.blocks or shape.blocks)
    device = pick_device(options.device)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="pipeline-") as name:
        folder = Path(name)
        model = options.model or folder / "model"
        started = time.perf_counter()
        if not model.exists():
            write_model(model, shape, word_tokenizer(shape.vocabulary), device)
        written = time.perf_counter() - started
        source = ModelSource("model", str(model), None, "", "")
        model_bytes = sum(file.stat().st_size for file in weight_files(model))
        rates = measured_rates(folder, model, model_bytes, device, pick_dtype("auto", source, device))
        print(f"{device_name(device)}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; {options.shape}, "
              f"{shape.blocks} blocks, {model_bytes / 1e9:.2f} GB, written in {written:.1f} s")  # fmt: skip
        print(machine.describe(rates), flush=True)
        if options.process == "this":
            rates = replace(rates, imports=0.0)
        failed = 0
        for preset in options.presets:
            path = write_experiment(folder, model, preset, options, overrides, shape)
            config = read_config(path, None, overrides)
            print(f"\n{preset}{''.join(f' {setting}' for setting in overrides)}\n", flush=True)
            status, measured = run(options.process, folder, model, path, overrides)
            if status:
                failed = 1
                continue
            made = Path(config.output_dir) / config.tag
            work = work_of(config, source, shape, model_bytes, made)
            whole = None if options.whole is None else floors(work.of_blocks(options.whole), rates)
            print("\n".join(table(measured, floors(work, rates), whole, options.whole)))
            print(f"\n{described(made, device)}", flush=True)
        return failed


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the settings for the pipeline."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--whole", type=int, help="blocks of the model that a column is for")
    parser.add_argument("--presets", nargs="+", default=["lqer-act"])
    parser.add_argument("--process", choices=["recorded", "unrecorded", "this"], default="recorded")
    parser.add_argument("--windows", type=int, default=20, help="to evaluate on")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--model", type=Path, help="folder of the checkpoint, which is kept there")
    options, rest = parser.parse_known_args(arguments)
    for argument in rest:
        if not argument.startswith("--") or "." not in argument.partition("=")[0] or "=" not in argument:
            parser.error(f"{argument}: neither an option nor of the form --section.key=value")
    return options, rest


def weight_files(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def measured_rates(folder: Path, model: Path, size: int, device: torch.device, dtype: torch.dtype) -> machine.Rates:
    """Rates of the machine, read from beside a checkpoint that an earlier call has kept."""
    kept = model.with_name(f"{model.name}.rates.json")
    if kept.exists():
        return machine.Rates(**json.loads(kept.read_text()))
    rates = machine.measure(folder, size, device, dtype)
    kept.write_text(json.dumps(asdict(rates)))
    return rates


def write_experiment(
    folder: Path, model: Path, preset: str, options: argparse.Namespace, overrides: list[str], shape: Shape
) -> str:
    """Write the configuration of a preset's run, and texts that are long enough for it. Returns its path."""
    texts = {part: folder / f"{part}.txt" for part in ("calibration", "evaluation")}
    experiment = {
        "extends": f"preset:{preset}",
        "model": str(model),
        "output_dir": str((folder / "runs" / preset).absolute()),
        "tag": preset,
        "device": options.device,
        "calibration": {"dataset": str(texts["calibration"])},
        "evaluation": {
            "baselines": ["original"],
            "perplexity": {"datasets": [str(texts["evaluation"])], "max_windows": options.windows},
        },
    }
    path = folder / f"{preset}.toml"
    path.write_text(tomli_w.dumps(experiment))
    config = read_config(str(path), None, overrides)
    lengths = {"calibration": config.calibration.num_samples * config.calibration.seq_len}
    if config.evaluation.perplexity is not None:
        lengths["evaluation"] = options.windows * config.evaluation.perplexity.seq_len
    for seed, (part, tokens) in enumerate(lengths.items()):
        # Of a running text, the last ids of what is read may be dropped.
        write_text(texts[part], shape.vocabulary, tokens + tokens // 10 + 100, seed)
    return str(path)


def run(process: str, folder: Path, model: Path, config: str, overrides: list[str]) -> tuple[int, Measured]:
    """Exit status and seconds of a run in a process of that kind; its log goes to the terminal's stderr."""
    for file in weight_files(model):
        machine.evict(file)
    seconds = folder / "seconds.json"
    recording = [str(seconds), config, *overrides]
    started = time.perf_counter()
    if process == "this":
        status = in_this_process(recording)
    elif process == "unrecorded":
        status = in_a_process([str(ROOT / "experiments/pipeline.py"), config, *overrides])
    else:
        status = in_a_process(["-m", "pipeline_benchmark.child", *recording])
    wall = time.perf_counter() - started
    found = {"main": {}, "background": {}} if process == "unrecorded" else json.loads(seconds.read_text())
    return status, Measured(found["main"], found["background"], wall)


def in_a_process(command: list[str]) -> int:
    """The exit status of Python with that command line."""
    paths = [str(ROOT / "experiments"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, *command], env=environment, stdout=subprocess.DEVNULL, check=False)
    return done.returncode


def in_this_process(recording: list[str]) -> int:
    """The exit status of a run that is recorded here, with no memory of earlier ones on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with redirect_stdout(io.StringIO()):
        return child.main(recording)


def described(made: Path, device: torch.device) -> str:
    """What the run whose folder is `made` says of itself: seconds of stages and between blocks, peak memory."""
    results = json.loads((made / RESULTS_FILE).read_text())
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in results["seconds"].items())
    written = sorted(file.stat().st_mtime for file in (made / CHECKPOINT_LINK).glob(f"{BLOCK}*"))
    between = [after - before for before, after in itertools.pairwise(written)]
    blocks = f"from block to block {statistics.median(between):.2f} s\n" if between else ""
    peak = f"peak memory {results['peak_memory_bytes'] / 1e9:.1f} GB{' of the GPU' * (device.type == 'cuda')}"
    return f"{stages}\n{blocks}{peak}"


def work_of(config: Config, source: ModelSource, shape: Shape, model_bytes: int, made: Path) -> Work:
    """What a finished run, whose folder is `made`, has done."""
    plans = plan_model(config, summarize_model(source))
    planned = [plan for plan in plans.values() if plan is not None]
    perplexity = config.evaluation.perplexity
    results = json.loads((made / RESULTS_FILE).read_text())
    # A window predicts all its tokens but the first.
    evaluated = sum(text["tokens"] for text in results["perplexity"])
    return Work(
        shape=shape,
        model_bytes=model_bytes,
        calibration_tokens=results["calibration"]["tokens"],
        evaluation_tokens=evaluated,
        sampled=config.calibration.error_tokens,
        propagates=config.quantize.propagates_error,
        hessian=Hessian() in requested_statistics(plans),
        feedback=any(plan.rounding.statistics for plan in planned),
        rank=max((plan.rank or 0 for plan in planned), default=0),
        stored=_size(Path(config.output_dir) / "store"),
        checkpoint=_size((made / CHECKPOINT_LINK).resolve()),
        models=0 if perplexity is None else 1 + len(config.evaluation.baselines),
        gradient_tokens=gradient_tokens(config),
    )


def gradient_tokens(config: Config) -> int:
    """Tokens that the loss is differentiated on: those of widths, and all of them again for token weights."""
    calibration, windows = config.calibration, 0
    if config.quantize.budget_bits is not None:
        windows += min(WINDOWS, calibration.num_samples)
    if calibration.token_weights == "gradient":
        windows += calibration.num_samples
    return windows * calibration.seq_len


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
