"""What gathering statistics costs: a walk through the decoder blocks with calibration's hooks against one without.

    python experiments/benchmark_calibration.py [MODEL] [--windows 8] [--seq-len 512] [--repeats 5] [--request NAME ...]

MODEL is anything that a config's `model` may be (default: demo:smollm2-135m). Walks alternate in one process; the
medians and their ratio are printed. --request adds statistics that are gathered only for methods that need them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from functools import partial

import torch

from lqer.errors import LqerError
from lqer.models.loaders import OpenedModel
from lqer.models.source import load_model, pick_device, resolve_model
from lqer.models.structure import block_linears
from lqer.models.walker import walk_blocks
from lqer.report.environment import device_name
from lqer.stages.calibrate import ON_REQUEST, BlockObserver
from lqer.store.offload import Offload

# Tokens kept per site, as calibration.error_tokens does by default.
SAMPLED = 256


def _begin_batch(observer: BlockObserver, seq_len: int, first_window: int) -> None:
    observer.begin_batch(first_window * seq_len)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo:smollm2-135m")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--request", nargs="*", default=[], choices=sorted(ON_REQUEST))
    arguments = parser.parse_args()
    device = pick_device("auto")
    try:
        model = load_model(resolve_model(arguments.model), torch.float32, torch.device("cpu"))
    except LqerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    generator = torch.Generator().manual_seed(0)
    windows_WT = torch.randint(model.config.vocab_size, (arguments.windows, arguments.seq_len), generator=generator)

    def seconds(hooked: bool) -> float:
        opened = OpenedModel.resident(model, device, Offload())
        total = 0.0
        for visit in walk_blocks(opened, windows_WT, arguments.batch_size):
            linears = block_linears(visit.block) if hooked else {}
            observer = BlockObserver(linears, windows_WT.numel(), SAMPLED, device, arguments.request)
            started = time.perf_counter()
            visit.forward(partial(_begin_batch, observer, arguments.seq_len))
            if device.type == "cuda":
                torch.cuda.synchronize()
            total += time.perf_counter() - started
            observer.close()
        return total

    seconds(hooked=True)
    pairs = [(seconds(hooked=False), seconds(hooked=True)) for _ in range(arguments.repeats)]
    plain, hooked = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(with_hooks / without for without, with_hooks in pairs)
    tokens = windows_WT.numel()
    print(f"{arguments.model}, {tokens} tokens, {device_name(device)}, torch {torch.__version__}")
    print(f"plain walk {plain:.3f} s, with hooks {hooked:.3f} s; median of paired ratios {ratio:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
