"""Tokens a second of a 7B-shaped decoder with packed weights against the same model in bf16, compiled, in CUDA graphs.

    python experiments/benchmark_decoder.py [SCHEME ...] [--batches 1,16,64] [--compile blocks] [--profile int4-g128]
                                            [--json checkpoints/benchmark_decoder.json]

All 32 blocks run, one token for each sequence; every token attends to a whole static cache. Each scheme has a process
of its own: all compile at the same time and are timed one after the other. Prints a table as markdown and, with
--profile, the kernels of one step of that scheme; progress goes to stderr. Exit status: 0 whatever the times, 2 without
a GPU.
"""

from __future__ import annotations

import argparse
import json
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from decoder_benchmark.models import BF16, CONFIG, LABELS, SCHEMES, known_scheme

# Against bf16, by scheme and batch: at least, and aim.
BARS = {
    ("int4-g128", 1): (2.1, 2.8), ("w4a8-rank32", 1): (2.0, 2.6), ("e8p-rank64", 1): (1.8, 2.4),
    ("trellis2", 1): (2.0, 3.0), ("trellis3", 1): (2.0, 3.0),
}  # fmt: skip
BARS |= {(scheme, batch): bar for scheme in SCHEMES for batch, bar in ((16, (1.8, 2.4)), (64, (1.2, 1.6)))}
CACHE_TOKENS = 256
PROFILED_KERNELS = 16


def main() -> int:
    arguments = _arguments()
    if arguments.worker:
        from decoder_benchmark.worker import run

        from lqer.checkpoint.decode import inductor_options

        config = {**CONFIG, "num_hidden_layers": arguments.blocks}
        settings = {} if arguments.worker == BF16 else inductor_options()
        run(
            arguments.worker,
            arguments.batches,
            arguments.cache,
            arguments.compile,
            settings | dict.fromkeys(arguments.inductor, True),
            not arguments.separate,
            config,
        )
        return 0
    import torch

    if not torch.cuda.is_available():
        print("error: benchmark_decoder.py needs an NVIDIA GPU, and torch finds none here", file=sys.stderr)
        return 2
    started = time.monotonic()
    workers = {scheme: _Worker(scheme) for scheme in arguments.schemes}
    results: dict[tuple[str, int], dict[str, Any]] = {}
    try:
        for batch in arguments.batches:
            deadline = started + arguments.limit
            for worker in workers.values():
                worker.say("compile")
            ready = {scheme: worker for scheme, worker in workers.items() if _is_ready(scheme, worker, deadline)}
            _say(f"{time.monotonic() - started:4.0f} s  batch {batch}: {', '.join(ready)}")
            for scheme, worker in ready.items():
                profiles = scheme == arguments.profile and batch == arguments.batches[0]
                results[scheme, batch] = worker.time(profiles)
            workers = ready
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps([{"scheme": s, "batch": b, **r} for (s, b), r in results.items()]))
            print("\n".join(_table(results, batch)), flush=True)
            for row in results.get((arguments.profile, batch), {}).get("kernels", ())[:PROFILED_KERNELS]:
                print(f"    {row['microseconds']:8.1f} us  {row['count']:6.1f} x  {row['name'][:90]}", flush=True)
    finally:
        for worker in workers.values():
            worker.end()
    return 0


class _Worker:
    """The process of one scheme."""

    def __init__(self, scheme: str):
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", scheme]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self, deadline: float = float("inf")) -> dict[str, Any]:
        """The next line that it prints; {"problem": ..} where it ended or is late."""
        assert self._process.stdout is not None
        wait = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        if not select.select([self._process.stdout], [], [], wait)[0]:
            return {"problem": "not compiled within the limit"}
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"problem": f"ended with status {self._process.wait()}"}

    def say(self, what: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()

    def time(self, profiles: bool) -> dict[str, Any]:
        self.say("profile" if profiles else "time")
        return self.answer()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def _is_ready(scheme: str, worker: _Worker, deadline: float) -> bool:
    answer = worker.answer(deadline)
    if "problem" in answer:
        _say(f"{scheme}: {answer['problem']}")
        worker.end()
        return False
    _say(f"{scheme}: built in {answer['built']:.0f} s, compiled in {answer['compiled']:.0f} s")
    return True


def _table(results: dict[tuple[str, int], dict[str, Any]], batch: int) -> list[str]:
    lines = [
        "| model | batch | ms | tokens/s | times bf16 | at least | aim | GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    dense = results.get((BF16, batch), {}).get("milliseconds")
    for (scheme, of_batch), result in results.items():
        if of_batch != batch:
            continue
        if "problem" in result:
            lines.append(f"| {LABELS[scheme]} | {batch} | {result['problem']} | | | | | |")
            continue
        milliseconds = result["milliseconds"]
        times = f"{dense / milliseconds:.2f}" if dense else ""
        at_least, aim = BARS.get((scheme, batch), ("", "")) if scheme != BF16 else ("", "")
        lines.append(
            f"| {LABELS[scheme]} | {batch} | {milliseconds:.3f} | {1000 * batch / milliseconds:.0f} | {times} "
            f"| {at_least} | {aim} | {result['gigabytes']:.2f} |"
        )
    return lines


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = list(SCHEMES)
    parser.add_argument(
        "schemes",
        nargs="*",
        type=known_scheme,
        default=every,
        metavar="SCHEME",
        help=f"by default all: {', '.join(every)}",
    )
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 16, 64])
    parser.add_argument("--compile", choices=["blocks", "model"], default="blocks", help="what is compiled as a whole")
    parser.add_argument("--inductor", nargs="*", default=[], help="settings of Inductor to switch on, for all models")
    parser.add_argument("--separate", action="store_true", help="linears of one input run one by one")
    parser.add_argument("--blocks", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--cache", type=int, default=CACHE_TOKENS, help="tokens that every token attends to")
    parser.add_argument("--profile", choices=every, help="prints the kernels of a step of this scheme")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds after which no step is waited for")
    parser.add_argument("--json", type=Path, default=Path("checkpoints/benchmark_decoder.json"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
